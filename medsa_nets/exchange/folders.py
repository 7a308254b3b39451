"""A folder of an adapter: weights, settings that a person can read, and a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsa_nets.adaptations import settings_of
from medsa_nets.build import build_medsa
from medsa_nets.checksums import file_sha256
from medsa_nets.data.atomic import make_folder, temporary_name
from medsa_nets.errors import WeightsError, describe
from medsa_nets.networks import MedSA
from medsa_nets.networks.identity import decode_identity, decode_task, encode_identity, encode_task
from medsa_nets.training import save_atomically
from medsa_nets.weights import check_adapter, get_base
from medsa_nets.weights.hub import load_hub

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
FORMAT = "medsa"


def save_pretrained(network: MedSA, folder: str | Path, **card: Any) -> Path:
    """Write a network's adapter as a folder, see :func:`write_folder`."""
    return write_folder(network.state_dict(), folder, **card)


def write_folder(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    name: str | None = None,
    licence: str = "apache-2.0",
    data: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write an adapter's state dictionary as a folder.

    Args:
        state: as ``MedSA.state_dict()`` or a file ``model.pt`` holds it.
        folder: is made, and gets ``adapter_model.safetensors``, ``adapter_config.json`` and ``README.md``.
        name: title of the model card; none takes the folder's name.
        licence: of the adapter, by Hugging Face's identifier.
        data: one sentence on what it was trained on.
        metrics: measured figures, by name.

    Returns:
        The folder.

    Raises:
        WeightsError: when the state is no adapter's.
    """
    if "identity" not in state:
        raise WeightsError("This state dictionary is no MedSA adapter: it has no entry 'identity'.")
    folder = make_folder(folder)
    identity = decode_identity(state["identity"])
    task = decode_task(state["task"]) if "task" in state else {}
    tensors = {
        key: t.detach().cpu().clone().contiguous() for key, t in state.items() if key not in ("identity", "task")
    }
    with temporary_name(folder / WEIGHTS) as part:
        save_file(tensors, str(part), metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "base_model": identity["base"],
        "base_sha256": identity["sha256"],
        "adapter": identity["adapter"],
        "task": task,
        "sha256": {WEIGHTS: file_sha256(folder / WEIGHTS)},
    }
    with temporary_name(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    parameters = sum(t.numel() for t in tensors.values())
    card = _card(name or folder.resolve().name, config, parameters, licence, data, metrics or {})
    with temporary_name(folder / CARD) as part:
        part.write_text(card, encoding="utf-8")
    return folder


def _card(
    name: str, config: Mapping[str, Any], parameters: int, licence: str, data: str, metrics: Mapping[str, float]
) -> str:
    base = get_base(config["base_model"])
    head = yaml.safe_dump(
        {
            "library_name": "medsa",
            "license": licence,
            "pipeline_tag": "image-segmentation",
            "tags": ["medical", "segment-anything", "medsa", config["adapter"].get("adaptation", "adapters")],
        },
        sort_keys=False,
    )
    facts = {
        "Base": f"`{base.name}` ({base.filename}, {base.licence}), sha256 of its weights `{config['base_sha256']}`",
        "Parameters that were trained": f"{parameters / 1e6:.2f} M",
        **{f"`{key}`": f"`{json.dumps(value)}`" for key, value in {**config["adapter"], **config["task"]}.items()},
    }
    lines = [f"---\n{head}---\n", f"# {name}\n", "An adapter of a frozen Segment Anything model, made with MedSA.\n"]
    lines += ["| what | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    if data:
        lines += ["## Data\n", data, ""]
    if metrics:
        lines += ["## Measured\n", "| figure | value |", "| --- | --- |"]
        lines += [*(f"| {key} | {value:.4g} |" for key, value in metrics.items()), ""]
    lines += ["## Use\n", "```python", "from medsa_nets.exchange import from_pretrained", "",
              f'network = from_pretrained("{name}").eval()', "```", "",
              "For research and development; not a medical device."]  # fmt: skip
    return "\n".join(lines) + "\n"


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """Read a folder back into an adapter's state dictionary, as ``model.pt`` holds it.

    Raises:
        WeightsError: when a file is missing, damaged, or not the one that the settings name by its sha256.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder / CONFIG}: not readable ({describe(error)}). Expected an adapter's folder."
        ) from error
    if not isinstance(config, Mapping) or config.get("format") != FORMAT:
        hint = " It is PEFT's: medsa_nets.exchange.read_peft reads it." if "peft_type" in config else ""
        raise WeightsError(f"{folder / CONFIG}: not the settings of a MedSA adapter (no format {FORMAT!r}).{hint}")
    try:
        expected = config["sha256"][WEIGHTS]
        identity = {"base": config["base_model"], "sha256": config["base_sha256"], "adapter": dict(config["adapter"])}
        task = dict(config["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: lacks {describe(error)}. Restore the file.") from error
    path = folder / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file. Fetch the whole folder.")
    if (found := file_sha256(path)) != expected:
        raise WeightsError(f"{path}: sha256 is {found}, {CONFIG} says {expected}. Fetch the folder again.")
    state: dict[str, Tensor] = load_file(str(path))
    return {**state, "identity": encode_identity(identity), "task": encode_task(task)}


def from_pretrained(source: str | Path, revision: str | None = None, **settings: Any) -> MedSA:
    """Build the network that an adapter's folder belongs to, with the adapter in it.

    Args:
        source: the folder, a file ``model.pt``, or the id of a repository on a hub of Hugging Face
            (``pip install 'medsa[hub]'``).
        revision: branch, tag or commit, of a hub.
        settings: further ones of :func:`~medsa_nets.build_medsa`, as ``sam_checkpoint``.

    Returns:
        The network.

    Raises:
        WeightsError: when the folder, or the base's weights, can't be had or do not fit.
    """
    state = _read(source, revision)
    identity, task = decode_identity(state["identity"]), decode_task(state["task"]) if "task" in state else {}
    size = task.get("image_size")
    network = build_medsa(
        identity["base"], **{**settings_of(identity["adapter"]), "img_size": tuple(size) if size else None, **settings}
    )
    network.load_state_dict(state)
    return network


def _read(source: str | Path, revision: str | None) -> dict[str, Tensor]:
    if Path(source).is_dir():
        return read_folder(source)
    if Path(source).suffix == ".pt" or Path(source).is_file():
        state: dict[str, Tensor] = torch.load(check_adapter(source), map_location="cpu", weights_only=True)
        if "identity" not in state:
            raise WeightsError(f"{source}: no MedSA adapter: it has no entry 'identity'.")
        return state
    return read_folder(pull(str(source), revision=revision))


def convert(source: str | Path, target: str | Path, **card: Any) -> Path:
    """Turn ``model.pt`` into a folder, or a folder into ``model.pt``; nothing is lost either way.

    Args:
        source: a file or a folder.
        target: the other one; a name that ends with ``.pt`` is a file.
        card: what the folder's model card says, see :func:`write_folder`.

    Raises:
        WeightsError: when the source is no adapter.
    """
    if Path(source).is_dir():
        return save_atomically(read_folder(source), target)
    return write_folder(torch.load(check_adapter(source), map_location="cpu", weights_only=True), target, **card)


def pull(repository: str, folder: str | Path | None = None, revision: str | None = None) -> Path:
    """Fetch an adapter's folder from a hub, and check it.

    Args:
        repository: its id, ``OWNER/NAME``; the hub is ``$HF_ENDPOINT``, else Hugging Face's.
        folder: where it goes; none keeps it in the hub's own cache.
        revision: branch, tag or commit.

    Raises:
        WeightsError: when it can't be had, or is damaged.
    """
    try:
        place = load_hub().snapshot_download(
            repository,
            revision=revision,
            local_dir=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except WeightsError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and the system raise errors of their own
        raise WeightsError(
            f"{repository}: neither a folder here, nor to be had from the hub ({describe(error)})."
        ) from error
    read_folder(place)
    return Path(place)


def push(folder: str | Path, repository: str, revision: str | None = None, private: bool = True) -> str:
    """Send an adapter's folder to a hub, after a check that it is whole.

    Args:
        folder: as :func:`write_folder` writes it.
        repository: id, ``OWNER/NAME``; it is made where it is missing.
        revision: branch.
        private: whether a new repository is private.

    Returns:
        The address of what was sent.

    Raises:
        WeightsError: when the folder is damaged or the hub refuses it.
    """
    read_folder(folder)
    api = load_hub().HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repository, folder_path=str(folder), revision=revision, allow_patterns=[WEIGHTS, CONFIG, CARD]
        )
    except Exception as error:  # the hub's client, its HTTP library and the system raise errors of their own
        raise WeightsError(f"{repository}: the hub did not take the adapter ({describe(error)}).") from error
    return str(sent)
