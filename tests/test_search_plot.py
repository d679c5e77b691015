"""The plot of a search's front: what nothing betters, beside the uniform group sizes."""

import json

import pytest

from qjax.search_plot import front_plot, front_series, save_fronts


def candidate(fitness, bitops, groups, search="search"):
    return {
        "event": "candidate",
        "search": search,
        "fitness": fitness,
        "bitops": bitops,
        "bytes": bitops / 4,
        "groups": groups,
    }


CANDIDATES = [
    candidate(3.0, 2e9, "64 64"),
    candidate(2.0, 3e9, "32 32"),
    candidate(1.0, 2.5e9, "32 64"),
    candidate(3e38, 1e9, "128 128"),
]


def test_the_front_has_no_candidate_that_another_betters():
    found = front_series(CANDIDATES, cost="bitops")
    # The cheapest, and the one that is better; not the dearer and worse, not the broken one.
    assert found == {
        "front of the search": ([2.0, 2.5], [3.0, 1.0]),
        "uniform group sizes": ([2.0, 3.0], [3.0, 2.0]),
    }
    assert front_series(CANDIDATES, cost="bytes")["front of the search"][0] == [5e5, 6.25e5]


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="at least one point"):
        front_plot([CANDIDATES[-1]])


def test_plots_lie_beside_the_logs_of_searches(tmp_path):
    for number, search in enumerate(["search", "fresh"]):
        folder = tmp_path / f"stage-{number}-x-parts"
        folder.mkdir()
        events = [{"event": "space"}, candidate(1.0, 2.0, "2 2", search)]
        (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    made = save_fronts(tmp_path)
    assert [p.name for p in made] == ["front-bitops.svg", "front-bytes.svg"]
    assert all(p.parent.name == "stage-0-x-parts" and "<svg" in p.read_text() for p in made)
