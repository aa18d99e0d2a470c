"""The Open Inference Protocol with Triton's own client, against a real process."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

triton = pytest.importorskip("tritonclient.http", reason="the extra `dev` is not installed")
utils = pytest.importorskip("tritonclient.utils", reason="the extra `dev` is not installed")

PATH = "/v2/models/basket/infer"
ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
# In the contract's order; what the row and the stored values come to.
FEATURES = [10.0, 2.0, 10.5, 99.5, 12.5, 12.5 / 3, 4.0, 8.0, 1.0, 30.0]
FIELD_TYPES = {
    "shop": "BYTES",
    "customer": "INT64",
    "placed_at": "BYTES",
    "price": "FP64",
    "items": "INT32",
    "channel": "BYTES",
    "age": "UINT8",
}
NUMPY = {"BYTES": np.object_, "INT64": np.int64, "FP64": np.float64, "INT32": np.int32, "UINT8": np.uint8}


@pytest.fixture
def url(model, run_service) -> str:
    process = run_service()
    process.wait_ready()
    address: str = process.url
    return address


@pytest.fixture
def client(url) -> Iterator[Any]:
    with triton.InferenceServerClient(url.removeprefix("http://")) as made:
        yield made


def fields(rows: list[dict[str, Any]], binary: bool, shape: tuple[int, ...] | None = None) -> list[Any]:
    tensors = []
    for name, datatype in FIELD_TYPES.items():
        values = np.array([row[name] for row in rows], dtype=NUMPY[datatype]).reshape(shape or (len(rows),))
        tensors.append(triton.InferInput(name, list(values.shape), datatype))
        tensors[-1].set_data_from_numpy(values, binary_data=binary)
    return tensors


def tensor(name: str, values: Any, datatype: str, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(np.shape(values)), datatype)
    made.set_data_from_numpy(np.array(values, dtype=utils.triton_to_np_dtype(datatype)), binary_data=binary)
    return made


def post(url: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + PATH, content=content, headers=headers)


def refused(answer: httpx.Response, status: int = 400) -> str:
    """The message, which stands where the protocol's clients and where ours look for it."""
    told = answer.json()
    assert answer.status_code == told["status"] == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert told["error"] == told["detail"]
    return str(told["error"])


def test_server_and_model_tell_what_they_are(client, model) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.is_model_ready("basket")
    assert client.is_model_ready("basket", "1")
    assert not client.is_model_ready("basket", "2")
    assert not client.is_model_ready("other")
    told = client.get_model_metadata("basket")
    assert (told["name"], told["versions"], told["platform"]) == ("basket", ["1"], "mlplatform_xgboost")
    assert {t["name"]: t["datatype"] for t in told["inputs"]} == FIELD_TYPES | {"items": "INT64", "age": "INT64"}
    assert [(t["name"], t["datatype"], t["shape"]) for t in told["outputs"]] == [
        ("prediction", "FP32", [-1]),
        ("decision", "BOOL", [-1]),
        ("imputed", "BYTES", [-1]),
    ]
    assert client.get_model_metadata("basket", "1") == told


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_request_fields_as_tensors_are_looked_up_and_answered_bit_for_bit(client, expected, binary) -> None:
    rows = [ROW, ROW | {"age": 3}, ROW | {"shop": "nowhere"}]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("imputed", "prediction", "decision")]
    result = client.infer("basket", fields(rows, binary), outputs=outputs, request_id="mine")
    told = result.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == ("basket", "1", "mine")
    assert [o["name"] for o in told["outputs"]] == ["imputed", "prediction", "decision"]
    assert told["parameters"]["variant"] == "champion"
    assert told["parameters"]["imputed"] == "customer_stats,shop_stats"
    assert len(told["parameters"]["request_id"]) == 32
    predictions = result.as_numpy("prediction")
    assert predictions.dtype == np.float32
    assert predictions.tolist()[:2] == expected([FEATURES, [*FEATURES[:-1], 3.0]])
    assert result.as_numpy("decision").tolist() == [bool(p >= 0.4) for p in predictions]
    imputed = [v.decode() if isinstance(v, bytes) else v for v in result.as_numpy("imputed").tolist()]
    assert imputed == ["", "", "shop_stats,customer_stats"]


def test_without_named_outputs_all_come_in_binary(client, expected) -> None:
    result = client.infer("basket", fields([ROW], True, (1, 1)))
    assert all("binary_data_size" in output["parameters"] for output in result.get_response()["outputs"])
    assert result.as_numpy("prediction").tolist() == expected([FEATURES])


def test_all_features_in_one_tensor_of_any_number_type(client, expected) -> None:
    matrix = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 1, 9], [9, 1, 8, 7, 6, 5, 4, 3, 0, 1]])
    numbers = [f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)]
    for name in ("features", "input-0"):
        for datatype in ("FP16", "FP32", "FP64", *numbers):
            # Triton's client has no JSON for FP16.
            for binary in (True,) if datatype == "FP16" else (True, False):
                result = client.infer("basket", [tensor(name, matrix, datatype, binary)])
                assert result.as_numpy("prediction").tolist() == expected(matrix), (name, datatype, binary)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_missing_features_are_nan_and_fractions_keep_their_bits(client, expected, binary) -> None:
    matrix = np.array([FEATURES, [float("nan"), *FEATURES[1:]]], dtype=np.float32)
    result = client.infer("basket", [tensor("features", matrix, "FP32", binary)])
    assert result.as_numpy("prediction").tolist() == expected(matrix)


def test_null_is_a_missing_feature_too_and_nested_data_is_data(url, expected) -> None:
    rows = [[None, *FEATURES[1:]], FEATURES]
    body = {"inputs": [{"name": "features", "shape": [2, 10], "datatype": "FP64", "data": rows}]}
    told = post(url, body).json()
    assert told["outputs"][0] == {
        "name": "prediction",
        "datatype": "FP32",
        "shape": [2],
        "data": expected([[np.nan, *FEATURES[1:]], FEATURES]),
    }


def test_features_by_name_stand_in_for_what_would_be_looked_up(client, expected) -> None:
    given = [tensor("orders", [77.5, 1.0], "FP32"), tensor("hour", [3, 4], "INT16")]
    result = client.infer("basket", [*fields([ROW, ROW], True), *given])
    rows = [[77.5, *FEATURES[1:]], [1.0, *FEATURES[1:]]]
    for row, hour in zip(rows, (3.0, 4.0), strict=True):
        row[2] = hour
    assert result.as_numpy("prediction").tolist() == expected(rows)


def test_binary_and_json_tensors_share_a_request(client, expected) -> None:
    mixed = [t for pair in zip(fields([ROW], True), fields([ROW], False), strict=True) for t in pair]
    wanted = [triton.InferRequestedOutput("prediction", binary_data=True), triton.InferRequestedOutput("decision", binary_data=False)]
    result = client.infer("basket", mixed[::4] + mixed[3::4], outputs=wanted)
    assert result.as_numpy("prediction").tolist() == expected([FEATURES])
    assert result.get_response()["outputs"][1]["data"] == [bool(expected([FEATURES])[0] >= 0.4)]


def test_a_bool_tensor_is_a_field_of_truth(make_model, run_service, tmp_path) -> None:
    contract = make_model().contract.model_dump(mode="json")
    more = {"name": "gift", "dtype": "bool", "description": "A gift", "example": True}
    made = make_model(fields=[*contract["fields"], more])
    made.into_cache(tmp_path)
    process = run_service()
    process.wait_ready()
    with triton.InferenceServerClient(process.url.removeprefix("http://")) as client:
        for binary in (True, False):
            client.infer("basket", [*fields([ROW, ROW], binary), tensor("gift", [True, False], "BOOL", binary)])
        with pytest.raises(utils.InferenceServerException, match=r"'gift': must be true or false"):
            client.infer("basket", [*fields([ROW], True), tensor("gift", [1], "INT8")])


def test_a_version_in_memory_answers_and_another_is_404_that_names_them(client, url, tmp_path) -> None:
    result = client.infer("basket", fields([ROW], True), model_version="1")
    assert result.get_response()["parameters"]["variant"] == "pinned"
    with pytest.raises(utils.InferenceServerException, match=r"version '7' of 'basket' is not in memory; those that answer: 1") as caught:
        client.infer("basket", fields([ROW], True), model_version="7")
    assert caught.value.status() == "404"
    assert "no model 'other' is served" in refused(httpx.get(url + "/v2/models/other"), 404)
    assert "is not in memory" in refused(httpx.get(url + "/v2/models/basket/versions/x/ready"), 404)


WRONG = [
    ([("features", [[1.0] * 9], "FP32")], r"'features': must have the shape \[n, 10\]"),
    ([("features", [1.0] * 10, "FP32")], r"'features': must have the shape \[n, 10\]"),
    ([("features", [[[1.0] * 10]], "FP32")], "has 3 dimensions"),
    ([("features", [["a"] * 10], "BYTES")], "must hold numbers"),
    ([("price", [[1.0, 2.0]], "FP32")], r"'price': must have the shape \[n\] or \[n, 1\]"),
    ([("nonsense", [1.0], "FP32")], "'nonsense' is neither a request field nor a feature"),
    ([("features", [[1.0] * 10], "FP32"), ("orders", [1.0], "FP32")], "gives 'orders' a second time"),
    ([("orders", [1.0], "FP32"), ("returns", [1.0, 2.0], "FP32")], "must have one length"),
    ([("features", [[float("inf")] * 10], "FP32")], "input 0, field 'features.orders': must be a finite number"),
    ([("shop", [7], "INT32")], "input 0, field 'shop': must be a string"),
    ([("features", np.zeros((0, 10)), "FP32")], "the tensors must hold at least one row"),
]


def test_wrong_tensors_are_refused_by_name(client) -> None:
    for tensors, message in WRONG:
        with pytest.raises(utils.InferenceServerException, match=message) as caught:
            client.infer("basket", [tensor(*one) for one in tensors])
        assert caught.value.status() == "400"


def described(**changed: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "orders", "shape": [1], "datatype": "FP32", "data": [1.0]} | changed]}


BROKEN = [
    (b"{", "the body is not JSON"),
    (b"\xff\xfe", "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    ([], "non-empty list of tensors"),
    ({"inputs": []}, "non-empty list of tensors"),
    ({"inputs": [1]}, "must be an object with a name"),
    ({"id": 7} | described(), "`id` must be a string"),
    ({"outputs": [{"name": "other"}]} | described(name="features", shape=[1, 10], data=FEATURES), "is no output of this model"),
    ({"outputs": {"name": "prediction"}} | described(), "must be a list of objects with a name"),
    ({"outputs": [{"name": "prediction"}] * 2} | described(), "names an output twice"),
    ({"parameters": 1} | described(), "`parameters` must be an object"),
    (described(datatype="FP8"), "`datatype` must be one of"),
    (described(datatype=["FP32"]), "`datatype` must be one of"),
    (described(shape="1"), "`shape` must be a list of sizes"),
    (described(shape=[]), "`shape` must be a list of sizes"),
    (described(shape=[-1]), "`shape` must be a list of sizes"),
    (described(shape=[True]), "`shape` must be a list of sizes"),
    (described(shape=[1.0]), "`shape` must be a list of sizes"),
    (described(shape=[10**18]), "has more than 10000 elements"),
    (described(shape=[10**30]), "`shape` must be a list of sizes"),
    (described(shape=[10**15, 10**15]), "has more than 10000 elements"),
    (described(shape=[2]), "has 1 elements, its shape says 2"),
    (described(data=None), "`data` must be a list"),
    (described(data=[[1.0], [2.0]], shape=[2, 2]), "nested otherwise than its shape"),
    (described(data=["x"]), "its elements must be numbers"),
    (described(data=[[1]]), "its elements must be numbers"),
    (described(data=[True]), "its elements must be numbers"),
    (described(data=[10**400]), "must be a finite number"),
    (described(data=[1e39]), "must be a finite number"),
    (described(datatype="INT8", data=[128]), "holds a number that is no INT8"),
    (described(datatype="INT8", data=[1.0]), "its elements must be integers"),
    (described(datatype="BYTES", data=[1]), "its elements must be strings"),
    (described(datatype="BOOL", data=[1]), "its elements must be true or false"),
    (described(parameters={"binary_data_size": 4}), "`data` and `binary_data_size`"),
]


def test_a_broken_body_is_refused_with_its_reason(model, open_service) -> None:
    client = open_service()
    for body, message in BROKEN:
        answer = client.post(PATH, content=body if isinstance(body, bytes) else json.dumps(body))
        assert re.search(message, refused(answer)), (message, answer.text)


def with_binary(size: Any, raw: bytes, datatype: str = "FP32", shape: Any = (1,)) -> tuple[bytes, int]:
    told = described(datatype=datatype, shape=list(shape), parameters={"binary_data_size": size})
    del told["inputs"][0]["data"]
    head = json.dumps(told).encode()
    return head + raw, len(head)


NOT_ADDING_UP = [
    (4, b"\0\0\0", "FP32", (1,), "`binary_data_size` is 4, and 3 bytes are left"),
    (10**18, b"\0\0\0\0", "FP32", (1,), "bytes are left"),
    (10**30, b"\0\0\0\0", "FP32", (1,), "must be a number of bytes"),
    (-4, b"\0\0\0\0", "FP32", (1,), "must be a number of bytes"),
    (True, b"\0\0\0\0", "FP32", (1,), "must be a number of bytes"),
    ("4", b"\0\0\0\0", "FP32", (1,), "must be a number of bytes"),
    (4, b"\0\0\0\0", "FP32", (2,), "has 4 bytes, 2 elements of FP32 are 8"),
    (4, b"\0\0\0\0\0", "FP32", (1,), "1 bytes follow the last tensor"),
    (1, b"\2", "BOOL", (1,), "neither 0 nor 1"),
    (4, b"\xff\xff\xff\xff", "BYTES", (1,), "element 0 ends after its data"),
    (3, b"\1\0\0", "BYTES", (1,), "element 0 ends after its data"),
    (5, b"\1\0\0\0\xff", "BYTES", (1,), "element 0 is not UTF-8"),
    (10, b"\1\0\0\0a\1\0\0\0b", "BYTES", (1,), "are not 1 elements of BYTES"),
    (5, b"\1\0\0\0a", "BYTES", (2,), "are not 2 elements of BYTES"),
]


def test_binary_data_that_does_not_add_up_is_refused(model, open_service) -> None:
    client = open_service()
    for size, raw, datatype, shape, message in NOT_ADDING_UP:
        content, length = with_binary(size, raw, datatype, shape)
        answer = client.post(PATH, content=content, headers={"inference-header-content-length": str(length)})
        assert message in refused(answer)


def test_a_wrong_header_length_is_refused(model, open_service) -> None:
    client = open_service()
    content, _ = with_binary(4, b"\0\0\0\0")
    for length in ("-1", "1e3", "x", "", "99999999999999999999999", "5000", "²"):
        headers = {b"inference-header-content-length": length.encode()}
        assert "length of the JSON" in refused(client.post(PATH, content=content, headers=headers))


def test_other_media_types_and_compressed_bodies_are_415(client, url) -> None:
    assert "send application/json, application/octet-stream" in refused(post(url, b"x", **{"content-type": "text/csv"}), 415)
    with pytest.raises(utils.InferenceServerException, match="compressed bodies are not taken"):
        client.infer("basket", fields([ROW], True), request_compression_algorithm="gzip")


def test_more_rows_than_a_request_may_have_are_refused(model, open_service) -> None:
    told = {"inputs": [{"name": "orders", "shape": [11], "datatype": "FP32", "data": [1.0] * 11}]}
    assert "at most 10 inputs" in refused(open_service(serving_rows_limit=10).post(PATH, json=told))


def test_the_prediction_log_has_what_this_protocol_was_asked(model, open_service, logged) -> None:
    client = open_service()
    body = {"inputs": [{"name": "features", "shape": [1, 10], "datatype": "FP64", "data": FEATURES}]}
    told = client.post("/v2/models/basket/versions/1/infer", json=body).json()
    [record] = logged(1)
    assert record.request_id == told["parameters"]["request_id"]
    assert record.features == tuple(FEATURES)
    assert record.variant == "pinned"


def test_metrics_count_it_under_its_status(model, open_service) -> None:
    client = open_service()
    client.post(PATH, json=described(datatype="X"))
    client.post("/v2/models/basket/versions/9/infer", json=described())
    text = client.get("/metrics").text
    assert 'mlplatform_requests_total{model="basket",status="400",variant="champion",version="1"} 1.0' in text
    assert 'mlplatform_requests_total{model="unknown",status="404",variant="",version=""} 1.0' in text
