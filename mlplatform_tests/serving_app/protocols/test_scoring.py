"""MLflow's scoring protocol with MLflow's own client and its own makers of bodies, against the running service."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models.utils import convert_input_example_to_serving_input
from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from mlflow.utils.proto_json_utils import dump_input_data

PATH = "/v1/models/basket/invocations"
ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
# In the contract's order; what the row and the stored values come to.
FEATURES = [10.0, 2.0, 10.5, 99.5, 12.5, 12.5 / 3, 4.0, 8.0, 1.0, 30.0]
YOUNG = [*FEATURES[:-1], 3.0]
TABLE = pd.DataFrame([ROW, ROW | {"age": 3}])


@pytest.fixture
def client(model, open_service) -> httpx.Client:
    opened: httpx.Client = open_service()
    return opened


@pytest.fixture
def names(model) -> list[str]:
    return [f.name for f in model.contract.features]


@pytest.fixture
def scoring(client) -> ScoringServerClient:
    """MLflow's client, which takes whatever stands after the host for part of the address."""
    return ScoringServerClient("127.0.0.1", f"{client.base_url.port}/v1/models/basket")


@pytest.fixture
def ask(client) -> Callable[..., list[float]]:
    def predictions(body: Any, kind: str = "application/json") -> list[float]:
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        answer = client.post(PATH, content=content, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        told: list[float] = answer.json()["predictions"]
        return told

    return predictions


def test_mlflows_client_asks_with_a_frame_of_request_fields(scoring, client, expected) -> None:
    scoring.wait_server_ready(timeout=10)
    assert scoring.get_version() == mlflow.__version__ == client.get("/version").text
    for path in ("/ping", "/health"):
        assert (client.get(path).status_code, client.get(path).text) == (200, "\n")
    answer = scoring.invoke(TABLE)
    assert answer.get_predictions("ndarray").tolist() == expected([FEATURES, YOUNG])
    assert len(answer.get_predictions()) == 2
    assert (answer["model_version"], answer["variant"], answer["imputed"]) == (1, "champion", [[], []])


def test_mlflows_client_asks_with_frames_and_arrays_of_features(scoring, expected, names) -> None:
    rows = np.array([FEATURES, YOUNG])
    rows[1, 0] = np.nan  # its JSON says NaN, which is none of JSON's words
    assert scoring.invoke(pd.DataFrame(rows, columns=names)).get_predictions("ndarray").tolist() == expected(rows)
    assert scoring.invoke(pd.DataFrame(rows[:, ::-1], columns=names[::-1])).get_predictions("ndarray").tolist() == expected(rows)
    assert scoring.invoke(rows).get_predictions("ndarray").tolist() == expected(rows)


def test_fields_and_features_stand_in_one_frame(scoring, expected) -> None:
    frame = TABLE.assign(orders=[77.5, np.nan])
    changed = [[77.5, *FEATURES[1:]], [np.nan, *YOUNG[1:]]]
    assert scoring.invoke(frame).get_predictions("ndarray").tolist() == expected(changed)


@pytest.mark.parametrize("form", ["dataframe_split", "dataframe_records", "instances", "inputs"])
def test_each_of_mlflows_forms_gives_the_same_answers(ask, expected, form) -> None:
    bodies = {
        "dataframe_split": TABLE.to_dict(orient="split"),
        "dataframe_records": TABLE.to_dict(orient="records"),
        "instances": TABLE.to_dict(orient="records"),
        "inputs": TABLE.to_dict(orient="list"),
    }
    assert ask({form: bodies[form], "params": {}}) == expected([FEATURES, YOUNG])


def test_arrays_lists_of_columns_and_single_values_are_read_as_mlflow_reads_them(ask, expected, names) -> None:
    arrays = [FEATURES, YOUNG]
    for form in ("instances", "inputs"):
        assert ask({form: arrays}) == expected(arrays)
        assert ask({form: {name: [[row[i]] for row in arrays] for i, name in enumerate(names)}}) == expected(arrays)
    assert ask({"dataframe_split": {"data": arrays}}) == expected(arrays)
    assert ask({"inputs": ROW}) == expected([FEATURES])
    assert ask(dump_input_data([ROW, ROW])) == expected([FEATURES, FEATURES])
    assert ask(dump_input_data(arrays, inputs_key="instances")) == expected(arrays)


def test_an_input_example_as_mlflow_stores_it_is_a_body(ask, expected, names) -> None:
    frame = pd.DataFrame([FEATURES], columns=names)
    assert ask(convert_input_example_to_serving_input(frame)) == expected([FEATURES])
    assert ask(convert_input_example_to_serving_input(np.array([FEATURES, YOUNG]))) == expected([FEATURES, YOUNG])


def test_csv_is_read_as_pandas_writes_it(ask, expected, names) -> None:
    for index in (True, False):
        assert ask(TABLE.to_csv(index=index), "text/csv") == expected([FEATURES, YOUNG])
        assert ask(TABLE.to_csv(index=index).encode("utf-8-sig"), "text/csv; charset=utf-8") == expected([FEATURES, YOUNG])
    rows = np.array([FEATURES, YOUNG])
    rows[0, 3] = np.nan
    for missing in ("", "NA", "null"):
        assert ask(pd.DataFrame(rows, columns=names).to_csv(na_rep=missing, index=False), "text/csv") == expected(rows)
    text = pd.DataFrame([FEATURES], columns=names).astype({"channel": object}).assign(channel="store")
    assert ask(text.to_csv(index=False), "text/csv") == expected([FEATURES])


def test_text_that_pandas_would_take_for_missing_is_text_where_the_field_is_text(client) -> None:
    body = pd.DataFrame([ROW | {"shop": "NA"}]).to_csv(index=False)
    answer = client.post(PATH, content=body, headers={"content-type": "text/csv"})
    assert answer.json()["imputed"] == [["shop_stats", "customer_stats"]]


def test_a_missing_optional_field_is_missing_in_every_form(ask, expected) -> None:
    wanted = expected([[*FEATURES[:-1], np.nan], FEATURES])
    table = pd.DataFrame([ROW | {"age": None}, ROW])
    without = {name: value for name, value in ROW.items() if name != "age"}
    assert ask(dump_input_data(table)) == wanted
    assert ask(table.to_csv(index=False), "text/csv") == wanted
    assert ask({"dataframe_records": [without, ROW]}) == wanted
    assert ask({"dataframe_records": [without]}) == wanted[:1]


BROKEN = [
    ("{", "the body is not JSON"),
    (b"\xff", "the body is not JSON"),
    ("[" * 100_000, "the body is not JSON"),
    ("[]", "exactly one of dataframe_split"),
    ({}, "exactly one of dataframe_split"),
    ({"inputs": [ROW], "instances": [ROW]}, "exactly one of dataframe_split"),
    ({"messages": [], "inputs": [ROW]}, "'messages' is not known here"),
    ({"inputs": [ROW], "params": {"temperature": 1}}, "takes no params"),
    ({"inputs": "x"}, "inputs must be a non-empty list of rows"),
    ({"inputs": []}, "inputs must be a non-empty list of rows"),
    ({"inputs": {}}, "inputs must be columns of one length"),
    ({"inputs": ROW | {"age": [1, 2]}}, "inputs must be columns of one length"),
    ({"instances": [1, 2]}, "input 0: must be a list of the model's 10 features"),
    ({"instances": [FEATURES[:9]]}, "input 0: must be a list of the model's 10 features"),
    ({"dataframe_records": [FEATURES]}, "dataframe_records must be a list of objects"),
    ({"dataframe_records": {}}, "dataframe_records must be a non-empty list"),
    ({"dataframe_split": [ROW]}, "must be an object with `columns` and `data`"),
    ({"dataframe_split": {"columns": ["age", "age"], "data": []}}, "must be a list of different names"),
    ({"dataframe_split": {"columns": ["age"], "data": [[1, 2]]}}, "input 0: must be a list of 1 values"),
    ({"dataframe_split": {"columns": list(ROW), "data": []}}, "dataframe_split must hold at least one row"),
    ({"inputs": [ROW | {"nonsense": 1}]}, "'nonsense' is neither a request field nor a feature"),
    ({"inputs": [ROW | {"age": "old"}]}, "input 0, field 'age': must be an integer"),
    ('{"inputs": [{"orders": Infinity}]}', "must be a finite number"),
    ('{"inputs": [{"orders": NaN, "returns": ' + "9" * 400 + "}]}", "must be a finite number"),
    ('{"inputs": [{"orders": NaN, "returns": ' + "9" * 5000 + "}]}", "must be a finite number"),
]
BROKEN_CSV = [
    (b"", "a line of column names, and at least one of values"),
    (b"shop,age\n", "a line of column names, and at least one of values"),
    (b"\xff\xfe", "is not CSV in UTF-8"),
    (b'shop\n"a', "is not CSV in UTF-8"),
    (b"shop\n" + b"a" * 200_000, "is not CSV in UTF-8"),
    (b"age,age\n1,2\n", "stands twice"),
    (b"age\n1,2\n", "input 0: has more than 1 values"),
    (b"nonsense\n1\n", "'nonsense' is neither a request field nor a feature"),
    (TABLE.assign(age="old").to_csv(index=False).encode(), "input 0, field 'age': must be an integer"),
]


def test_broken_bodies_are_refused_in_mlflows_words_and_ours(client) -> None:
    for kind, cases in (("application/json", BROKEN), ("text/csv", BROKEN_CSV)):
        for body, message in cases:
            content = body if isinstance(body, str | bytes) else json.dumps(body)
            answer = client.post(PATH, content=content, headers={"content-type": kind})
            told = answer.json()
            assert (answer.status_code, told["error_code"], told["status"]) == (400, "BAD_REQUEST", 400), (body, answer.text)
            assert message in told["message"] == told["detail"], (body, answer.text)


def test_what_mlflow_refuses_is_refused_with_the_same_status(client) -> None:
    """Its own function beside the service, for bodies that both refuse before they ask a model."""

    class Model:
        metadata = None

        def predict(self, data: Any, params: Any = None) -> list[float]:
            return [0.0] * len(data)

    refused = [("{", "application/json"), ("[]", "application/json"), ("x", "text/plain"), ("{}", "application/json; charset=latin1")]
    for body, kind in refused:
        try:
            status = scoring_server.invocations(body, kind, Model(), None).status
        except mlflow.exceptions.MlflowException as error:
            status = error.get_http_status_code()
        assert client.post(PATH, content=body, headers={"content-type": kind}).status_code == status, (body, kind)


def test_parquet_and_other_models_are_refused(client) -> None:
    answer = client.post(PATH, content=b"PAR1", headers={"content-type": "application/vnd.apache.parquet"})
    assert (answer.status_code, answer.json()["error_code"]) == (415, "BAD_REQUEST")
    for answer in (client.post("/v1/models/other/invocations", json={}), client.get("/v1/models/other/ping")):
        assert answer.status_code == 404
    assert client.post("/v1/models/other/invocations", json={}).json()["error_code"] == "RESOURCE_DOES_NOT_EXIST"


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": list(ROW), "data": []}},
        {"inputs": {"age": []}},
        {"instances": []},
        {"dataframe_split": {"data": []}},
    ],
)
def test_a_table_without_rows_is_refused_in_the_words_of_its_form(client, body) -> None:
    answer = client.post(PATH, json=body)
    assert answer.status_code == 400
    [form] = body
    assert answer.json()["detail"].startswith(form)
    assert answer.json()["errors"][0]["field"] == form


@pytest.mark.parametrize("number", ["1_545", "\u0661\u0665"])
def test_numbers_that_only_python_reads_are_refused_in_csv(client, number) -> None:
    body = pd.DataFrame([ROW | {"customer": number}]).to_csv(index=False)
    answer = client.post(PATH, content=body.encode(), headers={"content-type": "text/csv"})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (400, "customer")


@pytest.mark.parametrize("path", [PATH, "/v2/models/basket/infer", "/v2/models/basket/versions/1/infer", "/v1/models/basket/predict"])
def test_a_query_parameter_that_means_nothing_is_refused_by_name_on_every_route_that_predicts(client, path) -> None:
    answer = client.post(f"{path}?foo=1", json={"inputs": [ROW]})
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"] == "query parameter 'foo' is not known here"
    assert answer.json()["errors"] == [{"field": "query.foo", "detail": "query parameter 'foo' is not known here"}]
    if not path.endswith("/predict"):
        assert "'explain'" in client.post(f"{path}?explain=true", json={"inputs": [ROW]}).json()["detail"]
    else:
        assert "query parameter 'explain': " in client.post(f"{path}?explain=maybe", json={"inputs": [ROW]}).json()["detail"]
