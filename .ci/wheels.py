"""Fetch what a machine without a network lacks: wheels for another Python, for which torch is there already.

    python .ci/wheels.py wheels                        # of pyproject.toml's dependencies and its extra dev
    python .ci/wheels.py wheels --python 3.12 --torch 2.11.0 --extras dev gguf

torch and what it brings (triton, NVIDIA's libraries) are not fetched: an empty wheel stands for it while pip resolves
the rest. That nothing is missing is checked by a dry run of the installation with no index. docs/offline.md says what
to do on the other side. Needs pip 23 or newer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
PRESENT = "+present"  # the version of what is there already: no index has one of that name
# Has no wheel anywhere: built here, as it is pure Python. omegaconf asks for it.
BUILT = ("antlr4-python3-runtime==4.9.3",)


def requirements(extras: list[str]) -> list[str]:
    """List the project's dependencies, and those of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unknown = set(extras) - project["optional-dependencies"].keys()
    if unknown:
        raise SystemExit(f"pyproject.toml has no extra {', '.join(sorted(unknown))}")
    return [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]


def stand_in(folder: Path, name: str, version: str) -> str:
    """Write an empty wheel of a package that is there already; returns its pinned requirement."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}=={version}"


def platforms(glibc: int, machine: str) -> list[str]:
    """List the names of platforms whose wheels run with glibc 2.`glibc`; pip takes only the names it is given."""
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(glibc, 4, -1)), f"manylinux2014_{machine}"]


def pip(*arguments: str) -> None:
    """Run this Python's pip; its own words are shown where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("\n".join([*done.stderr.splitlines()[-10:], f"pip {arguments[0]} did not end well"]))


def requires(wheel: Path) -> list[Requirement]:
    """Read what a wheel says that it needs."""
    with zipfile.ZipFile(wheel) as content:
        (metadata,) = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(content.read(metadata).decode())
    return [Requirement(text) for text in headers.get_all("Requires-Dist", [])]


def missing(needed: list[str], out: Path, there: dict[str, str], python: str) -> list[str]:
    """List the requirements that no wheel of the folder meets, as the other machine's Python reads them.

    pip reads the conditions of requirements (`python_version < "3.12"`) for the Python that it runs on, whatever it is
    asked to fetch for.
    """
    wheels = {parse_wheel_filename(path.name)[0]: path for path in sorted(out.glob("*.whl"))}
    other = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    other |= {"platform_system": "Linux", "implementation_name": "cpython"}
    waiting = [Requirement(text) for text in needed]
    seen, absent = set(), []
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({**other, "extra": extra}) for extra in extras):
            continue
        if name in there or (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        if name not in wheels or not requirement.specifier.contains(parse_wheel_filename(wheels[name].name)[1]):
            absent.append(f"{requirement.name}{requirement.specifier}")
            continue
        for further in requires(wheels[name]):
            asked = further.marker is None or any(further.marker.evaluate({**other, "extra": one}) for one in extras)
            if asked:
                further.marker = None
                waiting.append(further)
    return absent


def fetch(needed: list[str], out: Path, there: dict[str, str], target: list[str], python: str) -> None:
    """Fetch the wheels of `needed` and all they need but `there` (names and versions), and check that none is missing.

    `target` are pip's options that name the other machine's Python and platform.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pins = [stand_in(folder, name, version + PRESENT) for name, version in there.items()]
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        known = ["--find-links", str(out), "--find-links", str(folder), "--constraint", str(constraints)]
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), *BUILT)
        pip("download", "--quiet", "--dest", str(out), *target, *known, *needed)
        absent = missing(needed, out, there, python)
        while absent:
            pip("download", "--quiet", "--dest", str(out), *target, *known, *absent)
            before, absent = absent, missing(needed, out, there, python)
            if absent == before:
                raise SystemExit(f"{out} lacks {', '.join(absent)} still: empty the folder and fetch again")
        # As the other side will find it: from the folder alone.
        dry = ["install", "--quiet", "--dry-run", "--ignore-installed", "--ignore-requires-python", "--no-index"]
        pip(*dry, "--target", str(folder / "x"), *target, *known, *needed)
    for name in there:
        for wheel in out.glob(f"{name}-*{PRESENT}-*.whl"):
            wheel.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder, which is added to")
    parser.add_argument("--python", default="3.12", help="version on the other side")
    parser.add_argument("--torch", default="2.11.0", help="version that is there")
    parser.add_argument("--triton", default="3.9.0", help="version that is there, or that must be taken for it")
    parser.add_argument("--glibc", type=int, default=28, help="its C library's version is 2 and this, or newer")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--extras", nargs="*", default=["dev"])
    parser.add_argument("--only", nargs="+", help="these requirements in place of the project's")
    args = parser.parse_args()
    target = ["--only-binary=:all:", "--python-version", args.python, "--implementation", "cp"]
    target += [option for platform in platforms(args.glibc, args.machine) for option in ("--platform", platform)]
    there = {"torch": args.torch, "triton": args.triton}
    fetch(args.only or requirements(args.extras), args.out, there, target, args.python)
    wheels = sorted(args.out.glob("*.whl"))
    print(
        f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:,.0f} MB in {args.out}: complete"
    )


if __name__ == "__main__":
    main()
