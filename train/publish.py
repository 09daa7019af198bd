"""`python -m train.publish saes=... repo=owner/name`: SAEs to the Hugging Face hub, as SAELens lays them out there.

A repository has a folder for each SAE, named as its folder here, with cfg.json, sae_weights.safetensors and a card;
`sae_lens.SAE.from_pretrained("owner/name", "<folder>")` loads one. The repository's own card says what there is. The
report of an evaluation and its pages go with it. Nothing is sent without go=true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.base import cli
from data.base.config import Flag, Settings, Text
from data.base.errors import UserError
from data.base.files import expand_globs, format_bytes
from data.base.records import Json
from train.interop.export import CARD

REPORT = "report"  # the folder of an evaluation in the repository
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_CLIENTS = ("httpx", "httpx2", "requests")  # of HTTP, by the version of huggingface_hub
_PAGES = ("report.json", "report.md", "report.html", "plots/*", "features/**/*")


class PublishSettings(Settings):
    """conf/publish.yaml: trained SAEs to the Hugging Face hub."""

    saes: Text | list[Text] | None = None
    """The folder of one SAE, of a sweep, or a glob or list of several; every SAE in or below counts."""
    repo: Text | None = None
    """The repository, owner/name; it is made where there is none."""
    report: Text | None = None
    """The folder of an evaluation: its figures go into the cards, its report, plots and pages beside the SAEs."""
    private: Flag = True
    """Whether a repository that is made is private; one that is there stays as it is."""
    licence: Text = "mit"
    """The licence in the card, by the hub's name for it."""
    message: Text = "Add SAEs trained with Thresher"
    """Of the commit."""
    go: Flag = False
    """Send it; without it the files are only listed."""


@dataclass(frozen=True)
class Upload:
    """What goes to a repository: the content of each file, or the file here that has it, by its path there."""

    repo: str
    files: dict[str, bytes | Path]

    def size(self, path: str) -> int:
        """Return the bytes of a file."""
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def listing(self) -> list[str]:
        """List the files with their sizes, the pages of latents counted in one line."""
        pieces = [path for path in self.files if "/features/" in path]
        lines = [f"  {format_bytes(self.size(path)):>9}  {path}" for path in self.files if path not in pieces]
        if pieces:
            total = sum(map(self.size, pieces))
            lines.append(f"  {format_bytes(total):>9}  {REPORT}/features/ ({len(pieces)} files)")
        return lines


def prepare_upload(settings: PublishSettings) -> Upload:
    """Make every file that is to go; UserError where the SAEs, the report or the name of the repository do not fit."""
    if not settings.repo or not _REPO.fullmatch(settings.repo):
        raise UserError(f"repo={settings.repo or ''} is no repository of the hub: give one as repo=owner/name")
    if not settings.saes:
        raise UserError("saes is not set: name the folder of an SAE or of a sweep, as in saes=outputs/sweep/ks")
    folders = _folders([settings.saes] if isinstance(settings.saes, str) else settings.saes)
    report = Path(settings.report) if settings.report else None
    if report is not None and not (report / "report.json").is_file():
        raise UserError(f"report={report} holds no report.json: name the folder of an evaluation (its out=)")
    files: dict[str, bytes | Path] = {CARD: _card(settings, folders, report).encode()}
    for name, folder in folders.items():
        files |= {f"{name}/{path}": content for path, content in _exported(folder, name, settings, report).items()}
    if report is not None:
        files |= {f"{REPORT}/{path.relative_to(report).as_posix()}": path for path in _pages(report)}
    return Upload(settings.repo, files)


def _folders(patterns: list[str]) -> dict[str, Path]:
    """Find the SAEs by the names that they are to have."""
    from train.sae.io import CONFIG
    from train.sae.weights_folder import WEIGHTS, folders_below

    folders: dict[str, Path] = {}
    for pattern in patterns:
        below = sorted({folder for match in expand_globs(pattern) for folder in folders_below(Path(match))})
        below = [folder for folder in below if (folder / CONFIG).is_file()]
        if not below:
            raise UserError(f"saes={pattern} holds no trained SAE (no {WEIGHTS} in or below it): fix the path")
        for folder in below:
            name = re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII)
            if folders.setdefault(name, folder).resolve() != folder.resolve():
                raise UserError(f"{folders[name]} and {folder} would both be {name} in the repository: rename one")
    return folders


def _pages(report: Path) -> Iterator[Path]:
    for pattern in _PAGES:
        yield from (path for path in sorted(report.glob(pattern)) if path.is_file())


def _exported(folder: Path, name: str, settings: PublishSettings, report: Path | None) -> dict[str, bytes]:
    """Make the files of one SAE in SAELens' format, with its card."""
    from train.interop import FORMATS
    from train.interop.card import card, reported
    from train.interop.fold import folded
    from train.interop.foreign import Origin
    from train.sae import load, load_config
    from train.sae.weights_file import TensorFile

    config = load_config(folder)
    origin = Origin.of(config, folder)
    found = None if report is None else reported(report / "report.json", folder, origin.fingerprint)
    sae = folded(load(folder))
    text = card(sae, origin, config, loading(settings.repo or "", name), found)
    made = FORMATS["saelens"].files(sae, origin)
    files = {name: b"".join(held.pieces()) if isinstance(held, TensorFile) else held for name, held in made.items()}
    return {**files, CARD: text.encode()}


def loading(repo: str, name: str) -> str:
    """Write the Python that loads an SAE of the repository."""
    lines = ["from sae_lens import SAE", f'sae = SAE.from_pretrained("{repo}", "{name}")']
    return "\n".join([*lines, "f = sae.encode(x); x_hat = sae.decode(f)"])


def _card(settings: PublishSettings, folders: dict[str, Path], report: Path | None) -> str:
    """Write the repository's card: the hub's own header, what there is, and how one is loaded."""
    from train.sae import load_config

    rows = []
    for name, folder in folders.items():
        config = load_config(folder)
        held_out = config.get("training", {}).get("heldout") or {}
        figures = " | ".join(_figure(held_out, metric) for metric in ("l0", "nmse"))
        site, width = config.get("site"), config["settings"]["width"]
        rows.append(f"| [{name}]({name}) | {config['variant']} | {site} | {width:,} | {figures} |")
    model = _model_of(next(iter(folders.values())))
    head = ["---", f"license: {settings.licence}", "tags:", "- sparse-autoencoder", "- saelens", "---", ""]
    lines = [f"# Sparse autoencoders of {model}", "", "Trained with Thresher, in SAELens' format:", ""]
    lines += ["```python", loading(settings.repo or "", next(iter(folders))), "```", ""]
    lines += ["| SAE | variant | site | latents | L0 | NMSE |", "| :-- | :-- | :-- | --: | --: | --: |", *rows, ""]
    lines += ["L0 and NMSE are of the inference form, on rows held out of training."]
    if report is not None:
        path = f"{REPORT}/report.md"
        lines += ["", f"Scores with their errors: [{path}]({path}); its page is `{REPORT}/report.html`."]
    return "\n".join([*head, *lines]) + "\n"


def _figure(figures: Json, metric: str) -> str:
    value = figures.get(metric)
    return "-" if value is None else f"{value:.1f}" if metric == "l0" else f"{value:.4f}"


def _model_of(folder: Path) -> str:
    from train.sae import load_config

    return str(load_config(folder).get("model_name", "a language model"))


def send_upload(upload: Upload, *, private: bool = True, message: str = "Add SAEs") -> str:
    """Send the files in one commit, the repository made where there is none; the address of the commit.

    The token is the hub's own: HF_TOKEN, or what `hf auth login` left. UserError where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    operations = [CommitOperationAdd(path, content) for path, content in upload.files.items()]
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        commit = api.create_commit(upload.repo, operations, commit_message=message)
    except HfHubHTTPError as error:
        raise UserError(_refused(upload.repo, error)) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        why = type(error).__name__
        raise UserError(f"the hub cannot be reached ({why}): check the network and HF_ENDPOINT") from None
    return str(commit.commit_url)


def _refused(repo: str, error: Any) -> str:
    """Say what the hub's answer means; its text, which may repeat a request, is left out."""
    code = error.response.status_code if error.response is not None else None
    if code in (401, 403):
        return (
            f"the hub refuses {repo} ({code}): set HF_TOKEN to a token that may write there, or log in with "
            "`.venv/bin/hf auth login`"
        )
    return f"the hub answers {code} for {repo}: check the name of the repository, and try again later"


def publish(settings: PublishSettings) -> None:
    """List what goes, and send it where it is asked for."""
    upload = prepare_upload(settings)
    print("\n".join(upload.listing()))
    said = f"{len(upload.files)} files, {format_bytes(sum(map(upload.size, upload.files)))}"
    if not settings.go:
        print(f"{said}, would go to {upload.repo}; nothing was sent: give go=true to send them")
        return
    address = send_upload(upload, private=settings.private, message=settings.message)
    print(f"{said}: {address}")


def main(config: DictConfig) -> None:
    """Run the command from Hydra's configuration."""
    publish(PublishSettings.of(cli.stage_settings(config, "publish")))


if __name__ == "__main__":
    cli.run(main, "publish")
