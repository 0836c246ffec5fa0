"""Checkpoint of a training in one file, from which an interrupted training is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hessfunc.files import write_whole


@dataclass(frozen=True)
class TrainingCheckpoint:
    """File with the weights under ``state_dict`` and all other state of a training.

    The file is replaced atomically, so that an interruption at any time leaves a complete state.

    Attributes:
        path: Path of the file.
        settings: Settings of the training as plain data. A state with other settings is refused.
        every: Number of steps between two states, in addition to the state after each epoch.
    """

    path: Path
    settings: Mapping[str, Any]
    every: int = 100

    def write(self, state: Mapping[str, Any], /, *, finished: bool) -> None:
        """Replace the state in the file."""
        content = {**state, "settings": json.dumps(self.settings), "finished": finished}
        write_whole(self.path, lambda file: torch.save(content, file))

    def read(self) -> dict[str, Any] | None:
        """Read the state onto the CPU; None if there is no file.

        Raises:
            ValueError: If the file is damaged, or if it contains a training with other settings.
        """
        if not self.path.exists():
            return None
        try:
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            stored, finished = json.loads(content["settings"]), content["finished"]
        except Exception as error:
            raise ValueError(
                f"{self.path} is damaged ({type(error).__name__}): remove it, or pass another --out"
            ) from error
        wanted = json.loads(json.dumps(self.settings))
        changed = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
        if not changed:
            return content
        name, kind = changed[0], "a finished" if finished else "an unfinished"
        raise ValueError(
            f"{self.path} contains {kind} training with other settings ({name} was "
            f"{stored.get(name)} and is now {wanted.get(name)}): pass another --out"
        )


def settings_of(path: Path, /) -> dict[str, Any]:
    """Return the settings of the training in a file; empty if the file contains no training."""
    try:
        content = torch.load(path.expanduser(), map_location="cpu", weights_only=True)
        settings = json.loads(content["settings"])
    # The code that loads the weights reports what is wrong with the file.
    except Exception:
        return {}
    return settings if isinstance(settings, dict) else {}
