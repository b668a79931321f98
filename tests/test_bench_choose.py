"""The table that chooses between the CUDA library and Triton is made from results as recorded."""

from bench import choose


def result(times: dict[str, list[tuple[float, float]]]) -> dict:
    rows = [
        {"op": op, "runs": {"fastenc cuda": {"seconds": cuda}, "fastenc triton": {"seconds": t}}}
        for op, pairs in times.items()
        for cuda, t in pairs
    ]
    rows.append({"op": "rope", "runs": {"fastenc cuda": {"error": "out of time"}}})
    return {"ops": rows, "machine": {"capability": "9.0"}}


def test_ratios_are_geometric_means():
    found = choose.ratios(result({"geglu": [(2.0, 1.0), (1.0, 2.0)], "rope": [(3.0, 2.0)]}))
    assert found.keys() == {("geglu", "sm_90"), ("rope", "sm_90")}
    assert abs(found["geglu", "sm_90"] - 1.0) < 1e-12 and found["rope", "sm_90"] == 1.5


def test_the_written_table_is_read_back():
    text = choose.TABLE.read_text()
    namespace: dict = {}
    exec(choose.table_source({("rope", "sm_90"): 1.5}, text), namespace)
    assert namespace["FASTER_IN_TRITON"] == {("rope", "sm_90"): 1.5}
    empty: dict = {}
    exec(choose.table_source({}, text), empty)
    assert empty["FASTER_IN_TRITON"] == {}
