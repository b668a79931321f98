"""A SetFit model's files.

setfit's own: the sentence-transformers folder and config_setfit.json. fastenc's: head.safetensors
(arrays) and head.json (what they are). setfit's model_head.pkl is a pickle; loading one runs code.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastenc._encoder_folder import find_file, read_json
from fastenc._encoder_write import write_folder, write_json, writing_folder
from fastenc.models._setfit_heads import DifferentiableHead, LinearHead

if TYPE_CHECKING:
    from fastenc.models.setfit import SetFitModel

CONFIG, PICKLE, ARRAYS, ABOUT = (
    "config_setfit.json", "model_head.pkl", "head.safetensors", "head.json",
)  # fmt: skip
log = logging.getLogger("fastenc")


# ---- reading -------------------------------------------------------------------------------------


def read_config(source: str) -> dict[str, Any]:
    """{"labels", "normalize_embeddings", ...} of config_setfit.json, and fastenc's strategy."""
    config = dict(read_json(source, CONFIG) or {})
    about = read_json(source, ABOUT) or {}
    if about.get("multi_target_strategy") is not None:
        config["multi_target_strategy"] = about["multi_target_strategy"]
    return config


def read_head(source: str, trust_pickle: bool) -> LinearHead | DifferentiableHead | None:
    """The head of a folder or hub id; None where it has none.

    Raises:
        ValueError: it is a pickle and not trusted, or the files contradict each other.
    """
    about = read_json(source, ABOUT)
    pickled = find_file(source, PICKLE)
    if about is not None and not _stale(about, pickled):
        return _from_files(source, about)
    if pickled is None:
        return None
    if not trust_pickle:
        raise ValueError(
            f"{source}: {PICKLE} is a pickle, and loading one runs code of the file; pass"
            f" trust_pickle=True if you trust it, then save_pretrained to another folder"
        )
    import joblib

    return _from_object(joblib.load(pickled))


def _stale(about: dict[str, Any], pickled: str | None) -> bool:
    """Whether another program wrote the pickle after fastenc wrote its head."""
    if pickled is None:
        return False
    return about.get("pickle_sha256") != _sha256(Path(pickled))


def strategy_of(head: LinearHead | DifferentiableHead) -> str | None:
    """What a head says of its strategy; setfit's differentiable head does not keep the name."""
    if isinstance(head, DifferentiableHead):
        return "multi-output" if head.multitarget else None
    return head.strategy


def _from_files(source: str, about: dict[str, Any]) -> LinearHead | DifferentiableHead:
    from safetensors.numpy import load_file

    path = find_file(source, ARRAYS)
    if path is None:
        raise OSError(f"{source}: {ABOUT} without {ARRAYS}")
    arrays, settings = load_file(path), about["settings"]
    try:
        if about["kind"] == "linear":
            return LinearHead.from_state(arrays, settings)
        if about["kind"] == "differentiable":
            head = DifferentiableHead(**settings)
            import torch

            head.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
            return head
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {ARRAYS} does not fit {ABOUT}: {error}") from error
    raise ValueError(f"{source}: {ABOUT} has a head of unknown kind {about['kind']!r}")


def _from_object(found: Any) -> LinearHead | DifferentiableHead:
    """fastenc's head from setfit's, unpickled."""
    if type(found).__name__ == "SetFitHead":
        head = DifferentiableHead(
            found.linear.in_features,
            found.linear.out_features,
            found.temperature,
            found.eps,
            found.linear.bias is not None,
            found.multitarget,
        )
        head.load_state_dict(found.state_dict())
        return head
    head = LinearHead()
    params = found if type(found).__name__ == "LogisticRegression" else None
    for name in ("estimator", "base_estimator"):
        inner = getattr(found, name, None)
        params = inner if params is None and hasattr(inner, "get_params") else params
    head.params = _changed_params(params)
    if hasattr(found, "coef_") or hasattr(found, "estimators_"):
        head.adopt(found)
    else:
        head = LinearHead(_strategy_of(found), **head.params)
    return head


def _strategy_of(estimator: Any) -> str | None:
    kinds = {
        "LogisticRegression": None,
        "OneVsRestClassifier": "one-vs-rest",
        "MultiOutputClassifier": "multi-output",
        "ClassifierChain": "classifier-chain",
    }
    kind = type(estimator).__name__
    if kind not in kinds:
        raise TypeError(f"expected a head made of LogisticRegression, got {kind}")
    return kinds[kind]


def _changed_params(estimator: Any) -> dict[str, Any]:
    """The parameters of a LogisticRegression that are not scikit-learn's defaults."""
    if type(estimator).__name__ != "LogisticRegression":
        return {}
    default = type(estimator)().get_params()
    given = estimator.get_params()
    return {k: v for k, v in given.items() if k in default and v != default[k]}


def new_head(
    width: int,
    strategy: str | None,
    differentiable: bool,
    params: dict[str, Any] | None,
    labels: Sequence[Any] | None,
) -> LinearHead | DifferentiableHead:
    """An unfitted head."""
    params = dict(params or {})
    if not differentiable:
        return LinearHead(strategy, **params)
    if strategy not in (None, "one-vs-rest", "multi-output"):
        raise ValueError(f"multi_target_strategy: a differentiable head has no {strategy}")
    if strategy is not None:
        params["multitarget"] = True
    if labels is not None:
        params.setdefault("out_features", len(labels))
    params.pop("device", None)  # the body's, as in setfit
    return DifferentiableHead(**params | {"in_features": width})


# ---- writing -------------------------------------------------------------------------------------


def save(model: SetFitModel, path: str | os.PathLike, pickled: bool) -> None:
    """Write everything under temporary names, then rename."""
    if not pickled and (Path(path) / PICKLE).exists():
        raise ValueError(
            f"{path} has a {PICKLE}, which would belong to another model: save to another folder,"
            " remove it, or use export_setfit"
        )
    with writing_folder(path) as folder:
        write_folder(folder, model.body.recipe())
        config = {"normalize_embeddings": model.normalize_embeddings, "labels": model.labels}
        write_json(folder / CONFIG, config)
        about = _write_head(folder, model.head)
        about["multi_target_strategy"] = model.multi_target_strategy
        if pickled:
            import joblib

            joblib.dump(_object_of(model.head), folder / PICKLE)
            about["pickle_sha256"] = _sha256(folder / PICKLE)
        write_json(folder / ABOUT, about)


def _write_head(folder: Path, head: LinearHead | DifferentiableHead) -> dict[str, Any]:
    from safetensors.numpy import save_file

    if isinstance(head, DifferentiableHead):
        arrays = {k: v.detach().cpu().numpy() for k, v in head.state_dict().items()}
        kind, settings = "differentiable", head.settings()
    else:
        kind = "linear"
        arrays, settings = head.state()
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / ARRAYS)
    return {"kind": kind, "settings": settings}


def _object_of(head: LinearHead | DifferentiableHead) -> Any:
    """What setfit pickles."""
    if isinstance(head, DifferentiableHead):
        from setfit import SetFitHead

        settings = head.settings()
        eps = settings.pop("eps")
        theirs = SetFitHead(**settings, eps=eps, device="cpu")
        theirs.load_state_dict(head.state_dict())
        return theirs
    from fastenc.models import _setfit_sklearn

    if head.fitted:
        return _setfit_sklearn.estimator_of(head)
    return _setfit_sklearn.unfitted(head.strategy, head.params)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
