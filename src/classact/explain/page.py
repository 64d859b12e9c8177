"""The report of `classact explain` as one HTML file that needs nothing else: pictures, and what they are worth."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from classact.explain.report import ExplainReport

SIDE = 228  # five pictures in a row
SHOWN = 60
STYLE = """
:root{--ink:#1b1f24;--soft:#5c6670;--line:#d9dee3;--bad:#a33a1a;--good:#1d6b3c;--card:#fff;--back:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa4ae;--line:#39424b;--bad:#f0906c;--good:#7fce9d;
--card:#1d2329;--back:#14181c}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:28px 20px 60px}h1{font-size:25px;margin:0 0 4px}h2{font-size:18px;margin:0}
p{margin:6px 0}.soft{color:var(--soft)}.card{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:16px 18px;margin:16px 0}.row{display:flex;flex-wrap:wrap;gap:14px;margin-top:12px}figure{margin:0;width:228px}
figure img{display:block;width:228px;height:auto;border-radius:4px}figcaption{font-size:13px;margin-top:5px}
table{border-collapse:collapse;margin-top:8px;font-size:14px}th,td{text-align:right;padding:4px 12px 4px 0;
border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}.scroll{overflow-x:auto}
.flag{color:var(--bad);font-size:13px;display:block}.fine{color:var(--good);font-size:13px;display:block}
.warn{border-left:4px solid var(--bad)}details{margin-top:8px;font-size:13px}b{font-weight:600}
"""


def overlay(image: Tensor, one: Tensor, strength: float = 0.6) -> np.ndarray:
    """A map (H, W) in colour over its image (3, H, W) in grey, stronger where the map is: (H, W, 3), all in [0, 1].

    Full colour begins at the 99.5th percentile: a few pixels of a sharp map would else leave the others invisible.
    """
    import matplotlib as mpl

    values = one.clamp(0, 1).numpy()
    if (bright := np.quantile(values, 0.995)) > 0:
        values = np.minimum(values / bright, 1)
    colour = mpl.colormaps["inferno"](0.15 + 0.85 * values)[..., :3]
    grey = image.mean(0).numpy()[..., None].repeat(3, axis=2)
    alpha = strength * np.sqrt(values)[..., None]
    return (1 - alpha) * grey + alpha * colour


def save_image(picture: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) in [0, 1] as a PNG file."""
    from PIL import Image

    Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8)).save(path)


def _embedded(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((SIDE * 3 // 2, SIDE * 3 // 2))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def remarks(entry: dict[str, Any]) -> list[tuple[bool, str]]:
    """What speaks for (True) and against (False) trusting a map, in words."""
    from classact.explain.report import SIMILAR

    if "gain" not in entry:
        return []
    found = []
    if entry["randomized"][-1] > SIMILAR:
        found.append((False, f"hardly changes when the network is shuffled (r = {entry['randomized'][-1]:.2f})"))
    if entry["other_class"] > SIMILAR:
        found.append((False, f"nearly the same for another class (r = {entry['other_class']:.2f})"))
    beaten = [kind for kind, better in entry["beats"].items() if not better]
    if beaten:
        found.append((False, f"not better than: {', '.join(_CONTROL_NAMES[kind] for kind in beaten)}"))
    else:
        found.append((True, "better than every control"))
    rivals = [name for name in entry["unstable"] if name not in entry["controls"]]
    if rivals:
        found.append((False, f"order against {', '.join(rivals)} flips with the fill"))
    return found


_CONTROL_NAMES = {
    "uniform": "no map at all",
    "gaussian": "a spot in the centre",
    "random": "random blobs",
    "edges": "an edge detector",
}


def _figure(picture: str, caption: str) -> str:
    return f'<figure><img src="{picture}" alt=""><figcaption>{caption}</figcaption></figure>'


def _map(out: Path, entry: dict[str, Any]) -> str:
    lines = [f"<b>{escape(entry['method'])}</b>"]
    if "gain" in entry:
        parts = [
            f"insertion {entry['insertion'][fill]:.2f}, deletion {entry['deletion'][fill]:.2f} ({fill})"
            for fill in entry["gain"]
        ]
        lines.append("<br>".join(parts))
        lines.append(
            f"confidence drop {100 * entry['average_drop']:.0f} %" + (", confidence rises" if entry["increase"] else "")
        )
    text = "<br>".join(lines)
    for good, remark in remarks(entry):
        text += f'<span class="{"fine" if good else "flag"}">{escape(remark)}</span>'
    return _figure(_embedded(out / entry["overlay"]), text)


def _item(out: Path, item: dict[str, Any], stem: str) -> str:
    says = ", ".join(f"{escape(p['name'])} {100 * p['probability']:.1f} %" for p in item["predictions"][:3])
    picture = _figure(_embedded(out / "overlays" / f"{stem}.png"), "as the network saw it")
    blocks: list[str] = []
    for c in dict.fromkeys(entry["class"] for entry in item["maps"]):
        entries = [entry for entry in item["maps"] if entry["class"] == c]
        figures = "".join(_map(out, entry) for entry in entries)
        blocks.append(
            f"<p>Why <b>{escape(entries[0]['name'])}</b>?</p>"
            f'<div class="row">{picture if not blocks else ""}{figures}</div>'
        )
    if not blocks:
        blocks = [f'<div class="row">{picture}</div><p class="soft">No class to explain.</p>']
    return f'<section class="card"><h2>{escape(item["file"])}</h2><p class="soft">{says}</p>{"".join(blocks)}</section>'


def _table(rows: list[dict[str, Any]]) -> str:
    names = {
        "method": "method",
        "maps": "maps",
        "gain_blur": "gain (blur)",
        "gain_mean": "gain (mean)",
        "beats_gaussian": "beats centre spot",
        "beats_random": "beats random",
        "average_drop": "confidence drop",
        "increase": "confidence rises",
        "randomized": "similar after shuffling",
        "other_class": "similar for other class",
    }
    used = [key for key in names if any(key in row for row in rows)]
    head = "".join(f"<th>{names[key]}</th>" for key in used)

    def cell(key: str, value: Any) -> str:
        if isinstance(value, float):
            share = key in ("beats_gaussian", "beats_random", "average_drop", "increase")
            return f"{100 * value:.0f} %" if share else f"{value:.2f}"
        return escape(str(value))

    body = "".join(
        "<tr>" + "".join(f"<td>{cell(key, row.get(key, ''))}</td>" for key in used) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


HELP = """<details><summary>How to read the numbers</summary>
<p><b>Insertion</b>: the image appears on a blurred or plain ground, the brightest parts of the map first; the number
is the average probability of the class on the way. High is good. <b>Deletion</b>: the same parts are taken away
first. Low is good. <b>Gain</b> is the first minus the second, measured with two fills (a blur, the image's mean
colour); an order of two maps that flips between the fills means nothing.</p>
<p><b>Controls</b> know nothing of the network: no map at all, a spot in the centre, random blobs, an edge detector. A
map that does not beat them is no evidence of what the network used, however convincing it looks.</p>
<p><b>Similar after shuffling</b>: rank correlation with the map of the same network after all its weights were
shuffled. Near 1, the map is about the picture, not about the network. <b>Similar for other class</b>: rank
correlation with the map of the likeliest other class. Near 1, the map does not say why this class; Eigen-CAM is so by
design.</p>
<p><b>Confidence drop</b>: how much of the probability is lost when the image is multiplied with the
map.</p></details>"""


def shown(interval: Any) -> str:
    """An estimate with its interval."""
    return f"{interval.effect:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _ranking(lines: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Methods and controls, best first, each value with its 95 % interval."""
    names = {
        "gain": "gain",
        "minus_control": "minus best control",
        "minus_best": "minus best method",
        "pointing": "pointing game",
        "energy": "energy inside",
        "box_accuracy": "box accuracy",
        "threshold": "threshold",
    }
    used = [key for key in names if any(row.get(key) is not None for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in ["method", *(names[key] for key in used)])
    body = ""
    for row in rows:
        cells = [row.get(key) for key in used]
        text = ["" if v is None else escape(v) if isinstance(v, str) else shown(v) for v in cells]
        name = f"<i>{_CONTROL_NAMES[row['method']]}</i>" if row["control"] else escape(row["method"])
        body += f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in text)}</tr>"
    words = "".join(f"<p>{escape(line)}</p>" for line in lines)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f'<div class="card"><h2>Which maps are worth using</h2>{words}{table}</div>'


def write_page(
    report: "ExplainReport", path: Path, lines: Sequence[str] = (), rows: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the report; the first images are embedded, the pictures of all lie beside it.

    Parameters
    ----------
    report : ExplainReport
        The records.
    path : Path
        The HTML file.
    lines, rows : sequence
        Summary and ranking of a comparison, shown first.
    """
    from classact.explain.report import flat_name

    parts = [
        f"<h1>What {escape(report.network)} looks at</h1>",
        (
            f'<p class="soft">{len(report.items)} images. Transform: {escape(str(report.transform))}. '
            f"Explained: {escape(report.options.target)}; layer: {escape(report.options.layer)}.</p>"
        ),
    ]
    if report.accuracy:
        a = report.accuracy
        low = a["accuracy"] <= a["chance"] + 2 * np.sqrt(a["chance"] * (1 - a["chance"]) / a["images"])
        text = (
            f"Accuracy on {a['images']} images in class folders: <b>{a['accuracy']:.3f}</b> (chance {a['chance']:.3f})."
        )
        if low:
            text += (
                " This is near chance: a wrong mean, size, channel or class order gives plausible, wrong maps. Check"
                " them before reading any picture below."
            )
        parts.append(f'<div class="card{" warn" if low else ""}">{text}</div>')
    if rows:
        parts.append(_ranking(lines, rows))
    parts.append(f'<div class="card"><h2>Can the maps be trusted?</h2>{_table(report.table())}{HELP}</div>')
    if report.unreadable:
        reasons = "".join(f"<li>{escape(one['reason'])}</li>" for one in report.unreadable)
        parts.append(
            f'<div class="card warn"><h2>{len(report.unreadable)} images could not be read</h2><ul>{reasons}</ul></div>'
        )
    if len(report.items) > SHOWN:
        parts.append(
            f'<p class="soft">The first {SHOWN} of {len(report.items)} images are shown; overlays/ has the pictures,'
            " maps/ the maps and items/ the numbers of all.</p>"
        )
    parts += [_item(report.out, item, flat_name(item["file"])) for item in report.items[:SHOWN]]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    )
    body = f"<body><main>{''.join(parts)}</main></body>"
    page = f"{head}<title>classact explain</title><style>{STYLE}</style></head>{body}</html>"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
