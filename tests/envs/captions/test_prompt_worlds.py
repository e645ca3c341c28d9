"""Prompts of GenEval's categories and of signs, and the files of tables: what a row says is what it asks for."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlflow.envs.captions import geneval, signs
from rlflow.envs.prompts import load_prompts

ALL = [row for kind in geneval.KINDS for side in (False, True) for row in geneval.rows(kind, side)]


class TestGeneval:
    def test_every_row_says_in_words_what_it_includes(self) -> None:
        """Classes, colours and numbers of the metadata stand in the prompt; relations in their order."""
        singular = {words: name for name, words in geneval.PLURALS.items()}
        for row in ALL:
            text = row["prompt"].removeprefix("a photo of ")
            for words, name in singular.items():
                text = text.replace(f" {words}", f" {name}") if row["tag"] == "counting" else text
            for thing in row["include"]:
                assert thing["class"] in text
                assert thing.get("color", "") in text
                if row["tag"] == "counting":
                    assert text.startswith(geneval.NUMBERS[thing["count"]])
            if row["tag"] == "position":
                b, a = row["include"]
                relation, index = a["position"]
                assert index == 0
                start, end = text.index(a["class"]), text.index(relation)
                assert start < end < text.index(b["class"], end)
            assert ("an a" in text) or " a a" not in text

    def test_counting_excludes_one_more(self) -> None:
        for row in ALL:
            more = [{"class": t["class"], "count": t["count"] + 1} for t in row["include"]]
            assert row["exclude"] == (more if row["tag"] == "counting" else [])

    def test_nothing_held_out_is_trained_on_in_other_words(self) -> None:
        sides = [{geneval.meaning(r) for k in geneval.KINDS for r in geneval.rows(k, held)} for held in (False, True)]
        assert not sides[0] & sides[1]
        assert 0.1 < len(sides[1]) / len(sides[0] | sides[1]) < 0.3
        left: dict[str, Any] = {
            "tag": "position",
            "include": [{"class": "b"}, {"class": "a", "position": ["left of", 0]}],
        }
        right = {"tag": "position", "include": [{"class": "a"}, {"class": "b", "position": ["right of", 0]}]}
        assert geneval.meaning(left) == geneval.meaning(right)
        left["include"][1]["position"][0] = "right of"
        assert geneval.meaning(left) != geneval.meaning(right)

    def test_there_are_80_classes_and_no_coloured_people(self) -> None:
        assert len(set(geneval.OBJECTS)) == 80
        assert not [t for row in ALL for t in row["include"] if "color" in t and t["class"] == "person"]

    def test_rows_are_the_same_in_every_process(self) -> None:
        assert geneval.rows("colors", True)[:2] == geneval.rows("colors", True)[:2]
        assert ALL[0]["prompt"] == "a photo of a sheep"

    def test_kinds_can_be_chosen_and_have_about_equal_shares(self) -> None:
        assert {r["tag"] for r in load_prompts("geneval:counting,colors").rows} == {"counting", "colors"}
        counts = [sum(r["tag"] == kind for r in load_prompts("geneval").rows) for kind in geneval.KINDS]
        assert max(counts) < 1.6 * min(counts)
        with pytest.raises(ValueError, match=r"unknown category \['count'\]: choose from .*counting"):
            load_prompts("geneval:count")

    def test_the_published_file_is_read(self, tmp_path: Path) -> None:
        """In which only some rows have `exclude`."""
        rows = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}]
        rows.append(rows[0] | {"tag": "counting", "exclude": [{"class": "cat", "count": 2}], "prompt": "one cat"})
        path = tmp_path / "evaluation_metadata.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        found = load_prompts(f"geneval:{path}", whole=True).rows
        assert [r["exclude"] for r in found] == [[], [{"class": "cat", "count": 2}]]


class TestSigns:
    def test_the_prompt_quotes_the_text_to_be_read(self) -> None:
        for row in load_prompts("signs").rows[::37]:
            assert row["prompt"].endswith(f'"{row["text"]}"')

    def test_a_held_out_text_is_asked_for_nowhere(self) -> None:
        train, held = ({r["text"] for r in load_prompts("signs", side).rows} for side in ("train", "heldout"))
        assert not train & held
        assert train | held == set(signs.texts())
        assert len(held) > 50


class TestFiles:
    def test_csv_names_its_columns_in_the_first_line(self, tmp_path: Path) -> None:
        path = tmp_path / "p.csv"
        path.write_text('\ufeffprompt,text\n"a sign, ""OPEN""",OPEN\nzwei\U0001f984,\n', encoding="utf-8")
        prompts = load_prompts(str(path))
        assert prompts.rows == ({"prompt": 'a sign, "OPEN"', "text": "OPEN"}, {"prompt": "zwei\U0001f984", "text": ""})
        assert prompts.place(1).endswith("p.csv:3")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("prompt,text\na,b,c\n", r"p\.csv:2: not as many values as the first line has names"),
            ("prompt,text\na\n", r"p\.csv:2: not as many values"),
            ("promt\na\n", r"p\.csv:2 has columns \['promt'\]"),
            ("prompt\n", "the prompt table is empty"),
            ('prompt\n"a"b\n', r"p\.csv:2: "),
        ],
    )
    def test_what_is_wrong_in_a_csv_is_said_with_its_line(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(ValueError, match=said):
            load_prompts(str(tmp_path / "p.csv"))

    def test_parquet_keeps_its_types(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{"prompt": "a", "text": "A", "n": 1}, {"prompt": "b", "text": "B", "n": 2}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
        assert load_prompts(str(tmp_path / "p.parquet")).rows == tuple(rows)
        (tmp_path / "bad.parquet").write_text("no table")
        with pytest.raises(ValueError, match=r"bad\.parquet: "):
            load_prompts(str(tmp_path / "bad.parquet"))
