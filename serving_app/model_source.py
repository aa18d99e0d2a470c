"""Where a version's files come from: the registry, verified on the way in, or the local cache of verified versions.

Belongs here: downloading, refusing pickles, verifying, the cache on disk. Does not belong here: loading into memory, when to look.

The cache: `<root>/<model>/<version>/` holds the contract, the model file and `origin.json`; `<root>/<model>/serving.json`
says which versions the aliases named last and how they share the traffic, so that the service starts with the registry down.
"""

import hashlib
import json
import re
import shutil
import tempfile
import uuid
from pathlib import Path

from mlplatform.contracts import CONTRACT_FILE
from serving_app.lineup import Lineup
from serving_app.model_handle import ModelRefusedError, VersionRef, read_contract, verify_model
from serving_app.registry import MlflowRegistry

_ORIGIN = "origin.json"
_SERVING = "serving.json"
_MLMODEL = "MLmodel"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")
# What unpickles when opened by the usual tools. Native formats need none of these.
_PICKLE_NAME = re.compile(r"\.(pkl|pickle|p|joblib|cloudpickle|dill|pt|pth|bin)$|pickle", re.IGNORECASE)
_PICKLE_START = re.compile(rb"\x80[\x02-\x05]")


def servable_name(model: str) -> bool:
    """Whether a registered name can be a folder and a part of an address."""
    return _NAME.match(model) is not None


def refuse_pickles(names: list[str]) -> None:
    """Raises ModelRefusedError where a file beside the model could carry code."""
    if found := sorted(n for n in names if _PICKLE_NAME.search(n)):
        raise ModelRefusedError("pickle", f"files that may carry code lie beside the model: {', '.join(found[:5])}")


class ModelCache:
    """Verified versions on disk. Several processes may share it: a folder appears whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, ref: VersionRef) -> Path:
        return self._root / ref.model / str(ref.version)

    def holds(self, ref: VersionRef) -> bool:
        """Whether the version is there and came from the same registered source. Says nothing about its bytes: loading verifies them."""
        return self._read(self.folder(ref) / _ORIGIN).get("source") == ref.source

    def verify(self, ref: VersionRef) -> None:
        """Raises ModelRefusedError where a file is not what was stored: the contract vouches for the model, this for the contract."""
        hashes = self._read(self.folder(ref) / _ORIGIN).get("sha256")
        for name, wanted in hashes.items() if isinstance(hashes, dict) else ():
            if hashlib.sha256((self.folder(ref) / name).read_bytes()).hexdigest() != wanted:
                raise ModelRefusedError("cache", f"{name} in the cache is not the file that was stored: altered or truncated")

    def models(self) -> list[str]:
        """Names of the models that have a version to fall back on."""
        return sorted(p.parent.name for p in self._root.glob(f"*/{_SERVING}")) if self._root.is_dir() else []

    def remembered(self, model: str) -> Lineup | None:
        """The versions and traffic rules the registry asked for last, as far as this cache knows."""
        return Lineup.from_json(model, self._read(self._root / model / _SERVING))

    def remember(self, model: str, lineup: Lineup) -> None:
        folder = self._root / model
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{_SERVING}.{uuid.uuid4().hex}"
        scratch.write_text(lineup.to_json())
        scratch.replace(folder / _SERVING)

    def store(self, ref: VersionRef, files: dict[str, bytes]) -> Path:
        """Writes a version's verified files in one step; returns their folder."""
        parent = self._root / ref.model
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".incoming-", dir=parent))
        try:
            hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
            for name, raw in (files | {_ORIGIN: json.dumps({"source": ref.source, "sha256": hashes}).encode()}).items():
                target = scratch / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(raw)
            self._put(scratch, self.folder(ref))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return self.folder(ref)

    @staticmethod
    def _put(scratch: Path, folder: Path) -> None:
        if folder.exists():
            aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=folder.parent))
            folder.rename(aside / "old")
            shutil.rmtree(aside, ignore_errors=True)
        scratch.rename(folder)

    @staticmethod
    def _read(path: Path) -> dict[str, object]:
        try:
            said = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}


async def download(registry: MlflowRegistry, ref: VersionRef) -> dict[str, bytes]:
    """The contract and the model file of a version, verified. Raises ModelRefusedError or RegistryError.

    Only these two are ever opened. The names of all others are looked at where the server can list them, and MLmodel's text
    where it can't, because a pickle beside the model means that someone meant it to be loaded another way.
    """
    names = await registry.file_names(ref)
    refuse_pickles(names if names is not None else _names_in((await registry.read(ref, _MLMODEL)) or b""))
    raw_contract = await registry.read(ref, CONTRACT_FILE)
    if raw_contract is None:
        raise ModelRefusedError("contract", f"no {CONTRACT_FILE} lies beside the model: it was not registered for this service")
    contract = read_contract(raw_contract, ref.model)
    refuse_pickles([contract.model_file])
    raw_model = await registry.read(ref, contract.model_file)
    if raw_model is None:
        raise ModelRefusedError("hash", f"the contract names {contract.model_file}, which is not in the registry")
    if _PICKLE_START.match(raw_model):
        raise ModelRefusedError("pickle", f"{contract.model_file} is a pickle under another name")
    verify_model(contract, raw_model)
    return {CONTRACT_FILE: raw_contract, contract.model_file: raw_model}


def _names_in(mlmodel: bytes) -> list[str]:
    return re.findall(r"[\w./-]+", mlmodel.decode(errors="replace"))
