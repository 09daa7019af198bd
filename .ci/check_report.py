"""Is the demo's report sane? `python .ci/check_report.py outputs/demo/report.json`; exit code 1 names what is not."""

import json
import sys
from pathlib import Path

VARIANTS = {"relu", "topk", "batchtopk", "matryoshka", "gated", "jumprelu"}


def faults(report: dict) -> list[str]:
    (site,) = report["sites"]
    found = []
    if {sae["variant"] for sae in site["saes"]} != VARIANTS:
        found.append("the report does not hold the six variants")
    if site["tokens"] < 50_000:
        found.append(f"{site['tokens']} held-out tokens were scored, fewer than 50,000")
    for sae in site["saes"]:
        name, values = sae["variant"], {key: entry["value"] for key, entry in sae["metrics"].items()}
        if not values["ce_clean"] < values["ce_spliced"] < values["ce_zero"]:
            found.append(f"{name}: CE clean < spliced < zero does not hold")
        if not 0 < values["nmse"] < 0.5:
            found.append(f"{name}: NMSE {values['nmse']:.3f} is not below 0.5")
        if name == "batchtopk" and abs(values["l0"] / sae["settings"]["k"] - 1) > 0.1:
            found.append(f"{name}: mean L0 {values['l0']:.1f} is not within 10% of k = {sae['settings']['k']}")
        if sae["expansion"] < 8 or sae["training"]["tokens"] < 500_000:
            found.append(f"{name}: a dictionary or a training smaller than the demo promises")
    return found


def main() -> None:
    path = Path(sys.argv[1])
    found = faults(json.loads(path.read_text()))
    missing = [
        name
        for name in ("report.md", "plots", "report.html", "features/index.html")
        if not (path.parent / name).exists()
    ]
    print("\n".join([*found, *(f"{name} is missing" for name in missing)]) or f"{path}: sane")
    sys.exit(bool(found or missing))


if __name__ == "__main__":
    main()
