"""The trained network as `torch.export` writes it, for tools that read pt2.

Belongs here: the export and its proof. Does not belong here: the file the service loads (`mlplatform.networks` says why it is another).
"""

import io
from pathlib import Path

import numpy as np
import torch

from mlplatform.networks import TabularNetwork


class ExportError(RuntimeError):
    """The exported network does not answer as the trained one does."""


def export(network: TabularNetwork, path: Path) -> None:
    """Writes `path`, any number of rows; its answers are the network's raw output. Raises ExportError where the file, read again,
    answers otherwise."""
    architecture = network.architecture
    rng = np.random.default_rng(0)
    columns = [rng.normal(size=(3, architecture.numeric)), *(rng.integers(0, size, (3, 1)) for size in architecture.categories)]
    rows = torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))
    rows[0, 0] = torch.nan
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(network.cpu().eval(), (rows,), dynamic_shapes={"rows": {0: torch.export.Dim("rows", min=1)}})
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        again = torch.export.load(io.BytesIO(buffer.getvalue())).module()
        for sample in (rows, rows[:1], rows.repeat(100, 1)):
            if not torch.allclose(again(sample), network(sample), rtol=1e-5, atol=1e-5):
                raise ExportError("the network read back from its pt2 file answers otherwise than the one it was made from")
    path.write_bytes(buffer.getvalue())
