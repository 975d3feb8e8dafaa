"""Traces, joins and verdicts of the authors' released code."""

from __future__ import annotations

from pathlib import Path

import pytest

from apr_ray.core.errors import AprError
from apr_ray.tasks.countdown.vectors import check_folder

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"


def test_every_vector_agrees() -> None:
    if not VECTORS.is_dir():
        pytest.skip(f"the released code's traces are not at {VECTORS}")
    report = check_folder(VECTORS)
    assert report.differences == []
    assert report.agree["grammar"] == report.agree["tokenizer"] == 768
    assert report.agree["resumed contexts"] == 80
    assert report.agree["verdicts"] == 255


def test_a_folder_without_vectors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AprError, match="is missing"):
        check_folder(tmp_path)


def test_a_difference_is_found_and_shown(tmp_path: Path) -> None:
    import gzip
    import json

    rows = {
        "apr_traces": [{"trace": {"main_calls": ["Moving to Node #0", "Moving to Nodes #0"], "sub_calls": []}}],
        "sosp_traces": [],
        "joins": [],
        "verdicts": [],
    }
    for name, lines in rows.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    report = check_folder(tmp_path)
    assert report.agree["grammar"] == 1
    assert report.differ["grammar"] == 1
    assert "apr_traces:1 text 1" in report.differences[0]
