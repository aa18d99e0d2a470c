"""The network that the torch family trains and the service runs: its architecture as data, its file, its answers.

Belongs here: what both sides must build alike from the same bytes. Does not belong here: training, serving. Importing this module
imports torch, so both import it where a torch model is met and nowhere before.

A model file is safetensors: weights as plain arrays, and the architecture as JSON in the file's metadata. Reading it runs no code of
the file, which neither pickle nor torch.export's `pt2` can promise (ADR 22).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

_METADATA = "architecture"
_CLIP = 6.0  # standard deviations: beyond it a network only extrapolates


class NetworkFileError(ValueError):
    """The bytes are no network of this platform."""


@dataclass(frozen=True)
class Architecture:
    """`numeric` columns, then one column of positions for each list of `categories` (its length). `quantiles` empty: a probability.

    `depth` hidden blocks of `width`; `dropout` in training only. Label units: `label_scale`, the unit of the network's output.
    """

    numeric: int
    categories: tuple[int, ...]
    quantiles: tuple[float, ...]
    width: int
    depth: int
    dropout: float
    label_centre: float = 0.0
    label_scale: float = 1.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """Raises NetworkFileError."""
        try:
            told: dict[str, Any] = json.loads(text)
            made = cls(**told | {name: tuple(told[name]) for name in ("categories", "quantiles")})
        except (ValueError, TypeError, KeyError) as error:
            raise NetworkFileError(f"not an architecture of this platform: {error}") from error
        if not (0 < made.width <= 4096 and 0 < made.depth <= 32 and sum(made.categories) <= 10_000_000 and made.numeric <= 100_000):
            raise NetworkFileError("the architecture asks for a network beyond all bounds")
        return made


class TabularNetwork(nn.Module):
    """Inputs float32 (n, numeric + categories), NaN = missing or unknown, as `training.dataset.to_matrix` makes them.

    Numbers are standardised (by `mean` and `scale`, part of the file) and clipped; whether each is missing is an input of its own;
    an unknown category has an embedding of its own (place 0). The output is (n, 1), a log-odds, or (n, levels): the median, and
    each other level as a distance from its neighbour that is never negative, so that quantiles cannot cross.
    """

    mean: Tensor
    scale: Tensor
    sizes: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        a = architecture
        self.register_buffer("mean", torch.zeros(a.numeric))
        self.register_buffer("scale", torch.ones(a.numeric))
        self.register_buffer("sizes", torch.tensor(a.categories, dtype=torch.float32), persistent=False)  # the architecture has them
        sizes = [(size + 1, min(16, 1 + round(size**0.5))) for size in a.categories]
        self.embeddings = nn.ModuleList(nn.Embedding(rows, width) for rows, width in sizes)
        inputs = 2 * a.numeric + sum(width for _, width in sizes)
        layers: list[nn.Module] = []
        for depth in range(a.depth):
            layers += [nn.Linear(inputs if depth == 0 else a.width, a.width), nn.LayerNorm(a.width), nn.SiLU(), nn.Dropout(a.dropout)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(a.width, max(1, len(a.quantiles)))
        self._median = a.quantiles.index(0.5) if a.quantiles else 0

    def forward(self, rows: Tensor) -> Tensor:
        numeric = self.architecture.numeric
        numbers = rows[:, :numeric]
        missing = torch.isnan(numbers)
        standard = torch.where(missing, 0.0, (numbers - self.mean) / self.scale).clamp(-_CLIP, _CLIP)
        parts = [standard, missing.to(rows.dtype)]
        if len(self.embeddings):
            positions = rows[:, numeric:]
            # A position beyond its list can only come from a request that gives it itself: unknown, as NaN is, which compares false.
            known = (positions >= 0) & (positions < self.sizes)
            codes = torch.where(known, positions + 1, 0.0).long()
            parts += [embedding(codes[:, place]) for place, embedding in enumerate(self.embeddings)]
        out: Tensor = self.head(self.body(torch.cat(parts, dim=1)))
        return out if not self.architecture.quantiles else self._quantiles(out)

    def _quantiles(self, out: Tensor) -> Tensor:
        steps = functional.softplus(out)
        # One step after the other, each of them rounded: so no two levels can change places by rounding either.
        levels = [out[:, self._median]]
        for place in range(self._median - 1, -1, -1):
            levels.insert(0, levels[0] - steps[:, place])
        for place in range(self._median + 1, out.shape[1]):
            levels.append(levels[-1] + steps[:, place])
        return torch.stack(levels, dim=1) * self.architecture.label_scale + self.architecture.label_centre


def with_weights(architecture: Architecture, weights: Mapping[str, Tensor]) -> TabularNetwork:
    """The network with these weights, ready to predict, on the processor. Raises RuntimeError where they are not its own."""
    with torch.random.fork_rng(devices=[]):  # new layers draw random weights; the caller's stream is not theirs to move
        network = TabularNetwork(architecture)
    network.load_state_dict(weights)
    return network.eval()


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """Runs torch with that many threads; the process has its own number back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_bytes(network: TabularNetwork) -> bytes:
    """The model file: the same weights give the same bytes."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(network.state_dict().items())}
    return safetensors.torch.save(state, {_METADATA: network.architecture.to_json()})


def from_bytes(raw: bytes, device: str = "cpu") -> TabularNetwork:
    """The network of a model file, ready to predict. Runs no code of the file. Raises NetworkFileError."""
    try:
        length = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
        network = with_weights(Architecture.from_json(metadata.get(_METADATA, "")), safetensors.torch.load(raw))
    except NetworkFileError:
        raise
    except (safetensors.SafetensorError, RuntimeError, ValueError, AttributeError) as error:
        raise NetworkFileError(f"not a network of this platform: {str(error).splitlines()[0]}") from error
    return network.to(device)


def predict(network: TabularNetwork, rows: npt.NDArray[np.floating[Any]], device: str = "cpu") -> npt.NDArray[np.float32]:
    """Probabilities, float32 (n,), or quantiles, (n, levels), for inputs (n, d); one transfer to the device and one back."""
    with torch.inference_mode():
        inputs = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).to(device)
        out = network(inputs)
        answers = out if network.architecture.quantiles else torch.sigmoid(out).squeeze(1)
        return np.asarray(answers.cpu().numpy())
