from slimgraph.table import text_table


def test_columns_of_numbers_are_aligned_to_the_right_and_integers_grouped():
    table = text_table(["layer", "MACs", "share"], [["conv1", 118013952, 0.5], ["fc", 512000, 0.25]])
    assert table.splitlines() == [
        "layer         MACs  share",
        "-------------------------",
        "conv1  118,013,952    0.5",
        "fc         512,000   0.25",
    ]


def test_a_footer_is_set_off_and_does_not_decide_the_alignment():
    table = text_table(["value", "bytes"], [["a", 1]], footer=["total", ""])
    assert table.splitlines() == [
        "value  bytes",
        "------------",
        "a          1",
        "------------",
        "total",
    ]


def test_a_table_without_rows_has_its_header():
    assert text_table(["value"], []).splitlines() == ["value", "-----"]


def test_truth_values_are_words():
    assert text_table(["fits"], [[True]]).splitlines()[-1] == "True"
