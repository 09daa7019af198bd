"""`python -m data rm`: one store removed, after it was said which SAEs are of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.base.errors import UserError
from data.base.location import Location
from data.storage.open import open_storage
from data.store.files import is_store
from data.tools.inventory import Entry, dependents, describe_training
from data.tools.trained import trainings


def remove_store(path: Location, outputs: Path, confirm: Callable[[str], bool] | None) -> list[str]:
    """Show a store and what depends on it, and remove it where `confirm` agrees; with None, only show.

    Returns the summary. Raises UserError where the folder is no store, or a link.
    """
    if isinstance(path, Path) and path.is_symlink():
        raise UserError(f"{path} is a link: name the folder that it leads to")
    if (isinstance(path, Path) and not path.is_dir()) or not is_store(path):
        raise UserError(f"{path} is no store: `python -m data list` shows what there is")
    entry = Entry.of(path)
    print(entry.line)
    trained = list(trainings(outputs)) if outputs.is_dir() else []
    if entry.store is None:
        print(f"which trainings are of it cannot be read ({entry.wrong})")
    own = dependents(entry, trained)
    for training in own:
        print(f"  {describe_training(training)}")
    if own:
        print("without it these SAEs can still be used, but not evaluated here, nor their trainings gone on with")
    elif entry.store is not None:
        print(f"no training in {outputs} is of it")
    if confirm is None:
        return ["nothing was removed: run it in a terminal, or with --yes"]
    if not confirm(f"remove {path}? [y/N] "):
        return ["nothing was removed"]
    open_storage(path).remove_all()
    return [f"removed {path}"]
