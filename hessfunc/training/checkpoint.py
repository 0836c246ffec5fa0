"""The state of a training in one file, for a training that was killed to go on from."""

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
    """A file with weights under ``state_dict``, and with all else that a training depends on.

    It is replaced in one step: whenever the process is killed, a whole state is there.

    Attributes:
        path: of the file.
        settings: of the training, plain data; a state of others is not taken up.
        every: so many steps lie between two states, besides those after each epoch.
    """

    path: Path
    settings: Mapping[str, Any]
    every: int = 100

    def write(self, state: Mapping[str, Any], /, *, finished: bool) -> None:
        """Replace the state."""
        content = {**state, "settings": json.dumps(self.settings), "finished": finished}
        write_whole(self.path, lambda file: torch.save(content, file))

    def read(self) -> dict[str, Any] | None:
        """The state, on the CPU, or None where there is none.

        Raises:
            ValueError: the file is damaged, or holds a training of other settings.
        """
        if not self.path.exists():
            return None
        try:
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            found, finished = json.loads(content["settings"]), content["finished"]
        except Exception as error:
            raise ValueError(
                f"{self.path} is damaged ({type(error).__name__}): remove it, or take another --out"
            ) from error
        wanted = json.loads(json.dumps(self.settings))
        changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if not changed:
            return content
        name, kind = changed[0], "a finished" if finished else "an unfinished"
        raise ValueError(
            f"{self.path} holds {kind} training of other settings, as {name} was "
            f"{found.get(name)} and is {wanted.get(name)} now: take another --out"
        )


def settings_of(path: Path, /) -> dict[str, Any]:
    """The settings of the training that a file holds, or none where it holds something else."""
    try:
        content = torch.load(path.expanduser(), map_location="cpu", weights_only=True)
        found = json.loads(content["settings"])
    # Whatever is wrong is said by those who read the weights.
    except Exception:
        return {}
    return found if isinstance(found, dict) else {}
