"""Which requests share a batch."""

import asyncio
from typing import Any

from mlplatform.clock import SystemClock
from mlplatform.feature_store.pipe import Pipe
from serving_app.batcher import Batcher, Scored
from serving_app.metrics import Metrics
from serving_app.model_handle import VersionRef, load_model
from serving_app.online_features import OnlineFeatures

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}


def test_what_came_while_a_batch_was_computed_stands_in_the_next_one(make_model, redis_url, tmp_path) -> None:
    """It lies in the sockets then, and shows in the event loop's next turn."""
    model = make_model()
    handle = load_model(VersionRef("basket", 1, "test"), model.into_cache(tmp_path), "cpu", 1)
    parsed = handle.parser.parse([ROW], 1)

    async def run() -> list[int]:
        loop = asyncio.get_running_loop()
        pipe = Pipe(redis_url, 5)
        batcher = Batcher(OnlineFeatures(pipe, None), SystemClock(), Metrics())
        answers: list[Scored] = []
        everybody = loop.create_future()

        class Caller:
            """Asks; `after` is what the answer sets off."""

            def __init__(self, after: Any = lambda: None) -> None:
                self._after = after
                batcher.enqueue(handle, parsed, self)

            def done(self) -> bool:
                return False

            def set_exception(self, exception: Exception) -> None:
                everybody.set_exception(exception)

            def set_result(self, result: Scored) -> None:
                answers.append(result)
                self._after()
                if len(answers) == 6:
                    everybody.set_result(None)

        def answered() -> None:
            Caller()  # waits when the batch ends
            for _ in range(4):
                loop.call_soon(Caller)  # read in the next turn

        Caller(answered)
        await everybody
        await pipe.aclose()
        return [len(scored.batch.predictions) for scored in answers]

    assert asyncio.run(run()) == [1, 5, 5, 5, 5, 5]
