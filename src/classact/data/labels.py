"""Tables of labels and files of splits, as the field writes them."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from classact.data.bag_files import DataError, bag_id

ID_COLUMNS = ("slide_id", "bag_id", "bag", "slide", "image_id", "image", "filename", "file", "id", "case_id", "patient")
LABEL_COLUMNS = ("label", "class", "target", "y", "diagnosis", "subtype")
PATIENT_COLUMNS = ("case_id", "patient", "patient_id", "submitter_id")
SURVIVAL_COLUMNS = ("survival_months", "survival_days", "censorship", "os_time", "os_event", "event_time")


@dataclass(frozen=True)
class Labels:
    """Label of every bag, and every column of the table for it."""

    of_bag: dict[str, str]
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    keyed_by_patient: bool = False
    without_label: tuple[str, ...] = ()  # bags that no row names
    without_bag: dict[str, str] = field(default_factory=dict)  # rows that name no bag, and their labels


def read_table(path: Path) -> Any:
    """Read a .csv, .tsv or .xlsx file as text."""
    import pandas as pd

    if not path.exists():
        raise DataError(f"{path}: no such file")
    suffix = path.suffix.lower()
    try:
        if suffix in (".xlsx", ".xls"):
            return pd.read_excel(path, dtype=str)
        if suffix not in (".csv", ".tsv", ".txt"):
            raise DataError(f"{path}: expected a table in .csv, .tsv or .xlsx, found {suffix or 'no suffix'}")
        return pd.read_csv(path, dtype=str, sep="," if suffix == ".csv" else "\t", encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error


def read_labels(path: Path, bags: list[str], id_column: str | None = None, label_column: str | None = None) -> Labels:
    """Match a table of labels with bags.

    Parameters
    ----------
    path : Path
        ``.csv``, ``.tsv`` or ``.xlsx`` with a header, or ``slide,label`` without one.
    bags : list of str
        Names of the bags, without suffix.
    id_column, label_column : str, optional
        Columns to use; else well-known names are looked for. Where the id column names patients (or no bag has a
        name from it), a bag belongs to the patient whose name it starts with.

    Raises
    ------
    DataError
        If columns are missing, the table is one of survival times or of several labels, or no bag has a label.
    """
    table = read_table(path)
    if table.shape[1] == 2 and not {id_column, label_column} - {None} and _is_headerless(table, bags):
        table.loc[-1] = list(table.columns)
        table = table.sort_index().reset_index(drop=True)
        table.columns = ["slide_id", "label"]
    columns = list(map(str, table.columns))
    id_column = id_column or _first(columns, ID_COLUMNS)
    label_column = label_column or _first(columns, LABEL_COLUMNS)
    for name, option in ((id_column, "--id-column"), (label_column, "--label-column")):
        if name is not None and name not in columns:
            raise DataError(f"{path}: no column {name!r}; there are {', '.join(columns)} ({option})")
    if label_column is None:
        survival = [c for c in columns if c.lower() in SURVIVAL_COLUMNS]
        if survival:
            raise DataError(
                f"{path}: a table of survival times ({', '.join(survival)}); this task needs classes. "
                "Name a column of classes with --label-column"
            )
        several = [c for c in columns if re.match(r"(?i)(label|class|target)[_ .-]?\w+$", c)]
        if len(several) > 1:
            raise DataError(
                f"{path}: several labels per bag ({', '.join(several)}); this task needs one class per bag. "
                "Choose one with --label-column"
            )
        raise DataError(f"{path}: no column of labels among {', '.join(columns)}; name it with --label-column")
    if id_column is None:
        raise DataError(f"{path}: no column of bag names among {', '.join(columns)}; name it with --id-column")
    empty = table[table[label_column].isna() | table[id_column].isna()]
    if len(empty):
        row = int(empty.index[0]) + 2
        raise DataError(f"{path}, line {row}: no value in {id_column!r} or {label_column!r} ({len(empty)} such rows)")
    multi = table[table[label_column].str.contains(r"[;|]")]
    if len(multi):
        raise DataError(
            f"{path}: several labels per bag ({multi[label_column].iloc[0]!r} in {label_column!r}); "
            "this task needs one class per bag"
        )
    distinct = table[label_column].unique()
    if len(distinct) > 20 and all(_is_fraction(value) for value in distinct):
        raise DataError(
            f"{path}: column {label_column!r} holds {len(distinct)} different numbers; this task needs classes"
        )
    keys = [bag_id(str(value).strip()) for value in table[id_column]]
    rows: dict[str, dict[str, str]] = {}
    for key, row in zip(keys, table.fillna("").to_dict("records"), strict=True):
        if key in rows and rows[key][label_column] != row[label_column]:
            raise DataError(
                f"{path}: {id_column} {key!r} has two labels: {rows[key][label_column]!r} and {row[label_column]!r}"
            )
        rows[key] = {str(k): str(v).strip() for k, v in row.items()}
    return _match(path, bags, rows, id_column, label_column)


def _match(path: Path, bags: list[str], rows: dict[str, dict[str, str]], id_column: str, label_column: str) -> Labels:
    owner = {bag: bag for bag in bags if bag in rows}
    by_patient = id_column.lower() in PATIENT_COLUMNS or not owner
    if by_patient:
        for bag in bags:
            ends = [i for i in range(len(bag), 0, -1) if i == len(bag) or not bag[i].isalnum()]
            match = next((bag[:i] for i in ends if bag[:i] in rows), None)
            if match is not None:
                owner[bag] = match
    labelled = [bag for bag in bags if bag in owner]
    without_label = tuple(bag for bag in bags if bag not in owner)
    if not labelled:
        raise DataError(
            f"{path}: no label in {label_column!r} for any of {len(bags)} bags: {some(list(without_label))} (names in "
            f"{id_column!r} look like {some(list(rows), 2)})"
        )
    used = set(owner.values())
    columns = {name: {bag: rows[owner[bag]][name] for bag in labelled} for name in next(iter(rows.values()))}
    if by_patient:
        columns[id_column] = dict(owner)
    return Labels(
        {bag: rows[owner[bag]][label_column] for bag in labelled},
        columns,
        by_patient,
        without_label,
        {name: row[label_column] for name, row in rows.items() if name not in used},
    )


def _is_headerless(table: Any, bags: list[str]) -> bool:
    return bag_id(str(table.columns[0]).strip()) in set(bags)


def _first(columns: list[str], known: tuple[str, ...]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in known if name in lower), None)


def _is_fraction(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def some(names: list[str], most: int = 5) -> str:
    """Name the first few of many."""
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def read_splits(path: Path, bags: list[str]) -> list[dict[str, list[int]]]:
    """Read predefined splits.

    Parameters
    ----------
    path : Path
        A file, or a folder of such files, one a fold: CLAM's ``splits_i.csv`` (columns train, val, test holding bag
        names) or ``splits_i_bool.csv`` (a row a bag, three booleans), JSON with ``train_names``, ``val_names``,
        ``test_names`` (ACMIL), or a table with a column ``split_info`` (BRACS).
    bags : list of str
        Names of the bags.

    Returns
    -------
    list of dict
        Per fold ``train``, ``validation`` and ``test``: positions in `bags`. ``validation`` may be empty.
    """
    if path.is_dir():
        files = [f for f in path.iterdir() if f.suffix in (".csv", ".json") and not f.name.startswith(".")]
        plain = [f for f in files if not re.search(r"_(bool|descriptor)\.csv$", f.name)]
        files = sorted(plain or files, key=lambda f: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", f.name)])
        if not files:
            raise DataError(f"{path}: found no split files (.csv or .json)")
    else:
        files = [path]
    return [_read_split(file, bags) for file in files]


def _read_split(path: Path, bags: list[str]) -> dict[str, list[int]]:
    names: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    if path.suffix == ".json":
        if not path.exists():
            raise DataError(f"{path}: no such file")
        content = json.loads(path.read_text(encoding="utf-8"))
        for part, key in (("train", "train_names"), ("validation", "val_names"), ("test", "test_names")):
            if key not in content:
                raise DataError(f"{path}: expected {key!r}, found {', '.join(content)}")
            names[part] = content[key]
    else:
        table = read_table(path)
        columns = {str(c).lower(): c for c in table.columns}
        if "split_info" in columns:
            id_column = columns.get("slide_id", table.columns[0])
            for name, part in zip(table[id_column], table[columns["split_info"]].str.lower(), strict=True):
                names["validation" if str(part).startswith("val") else str(part)].append(str(name))
        elif {"train", "val", "test"} <= set(columns):
            first = table.columns[0]
            for part, key in (("train", "train"), ("validation", "val"), ("test", "test")):
                column = table[columns[key]].dropna()
                if set(column.str.lower()) <= {"true", "false"} and len(column):
                    chosen = table.loc[column.index[column.str.lower() == "true"], first]
                    names[part] = list(chosen.astype(str))
                else:
                    names[part] = list(column)
        else:
            raise DataError(
                f"{path}: expected columns train, val, test or split_info, found {', '.join(map(str, table.columns))}"
            )
    position = {bag: index for index, bag in enumerate(bags)}
    split: dict[str, list[int]] = {}
    for part, members in names.items():
        found = [bag_id(str(name).strip()) for name in members]
        if missing := [name for name in found if name not in position]:
            raise DataError(f"{path}: {len(missing)} names in {part} have no bag: {some(missing)}")
        split[part] = [position[name] for name in found]
    twice = [bags[i] for i in set(split["train"]) | set(split["validation"]) if i in set(split["test"])]
    if twice:
        raise DataError(f"{path}: {len(twice)} bags are in the test part and in another: {some(sorted(twice))}")
    return split
