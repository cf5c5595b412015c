"""Where data sets lie: the folder that CLOQ_DATA names, or the Hugging Face hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import DataError, MissingPackageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.files.versions import require_versions

_HUB_TIMEOUT_S = 10.0


def local_file(*names: str) -> Path | None:
    """Return the first of several files that the folder named by CLOQ_DATA has; None without such a folder or file.

    Args:
        names: paths inside the folder, the preferred one first.
    """
    chosen = os.environ.get("CLOQ_DATA")
    if not chosen:
        return None
    folder = expand_user(chosen)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def hub_rows(identifier: str, config: str | None, split: str, *, remedy: str) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a data set on the hub.

    Args:
        identifier: the hub id.
        config: of the data set, None for its own default.
        split: of the data set.
        remedy: what a user can do without the hub, a sentence.

    Raises:
        MissingPackageError: the package `datasets` is not installed.
        DataError: it cannot be loaded, for lack of network or because there is no such data set or split.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise MissingPackageError(
            f"data set {identifier} is on the Hugging Face hub and the package `datasets` is not installed; install "
            f"it with `pip install cloq-export[hub]`. {remedy}"
        ) from None
    require_versions("hub")
    try:
        # One quick question first: the loader itself retries for minutes when there is no network.
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(identifier, timeout=_HUB_TIMEOUT_S)
        # Version 4 has no loading scripts any more; 3 would ask on standard input whether to run one.
        scripts = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
        no_code = {"trust_remote_code": False} if scripts else {}
        return datasets.load_dataset(identifier, config, split=split, **no_code)  # type: ignore[no-any-return]
    # The libraries below raise dozens of kinds of errors; every one ends in one line here.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data set {identifier} cannot be loaded from the Hugging Face hub ({reason[:200]}); it needs network, an "
            f"existing id, and a split {split!r}. {remedy}"
        ) from None
