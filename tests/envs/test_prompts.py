"""Prompt tables: every prompt once per epoch, from a pure function of the serial number; files and embedded worlds."""

import codecs
import csv
import hashlib
import io
import json
import tracemalloc
from collections import Counter

import pytest

from rlflow.envs.captions import scenes, words
from rlflow.envs.captions.files import read_rows
from rlflow.envs.prompts import Prompts, load_prompts
from rlflow.rl.groups import Groups


def table(num: int) -> Prompts:
    return Prompts(tuple({"prompt": f"p{i}"} for i in range(num)))


class TestIndex:
    @pytest.mark.parametrize("num", [1, 7, 50])
    def test_nothing_repeats_before_everything_was_seen(self, num):
        rows = table(num).index(range(3 * num), seed=0)
        for epoch in range(3):
            assert sorted(rows[epoch * num : (epoch + 1) * num]) == list(range(num))

    def test_every_epoch_and_seed_has_an_order_of_its_own(self):
        one = table(50).index(range(100), seed=0)
        assert one[:50] != one[50:]
        assert one != table(50).index(range(100), seed=1)
        assert one[:50] != sorted(one[:50])

    def test_is_a_function_of_the_serial_number_alone(self):
        prompts = table(50)
        straight = prompts.index(range(200), seed=3)
        for some in ([7, 199, 7, 0], [120], list(range(90, 110))):
            assert prompts.index(some, seed=3) == [straight[s] for s in some]

    @pytest.mark.parametrize("groups", [Groups(6, 4), Groups(7, 2)], ids=repr)
    def test_groups_walk_the_table_over_iterations_without_repeats(self, groups):
        """Also where an epoch ends in the middle of an iteration."""
        prompts = table(20)
        seen = []
        for iteration in range(10):
            rows = prompts.index(groups.seeds(iteration).tolist(), seed=0)
            assert rows == [r for r in rows[:: groups.group_size] for _ in range(groups.group_size)]
            seen += rows[:: groups.group_size]
        for epoch in range(len(seen) // 20):
            assert sorted(seen[epoch * 20 : epoch * 20 + 20]) == list(range(20))

    def test_processes_together_see_what_one_sees(self):
        prompts = table(20)
        whole = prompts.index(Groups(6, 4).seeds(5).tolist(), seed=0)
        parts = [prompts.index(Groups(6, 4, r, 3).seeds(5).tolist(), seed=0) for r in range(3)]
        assert [row for part in parts for row in part] == whole

    def test_take_keeps_columns_together(self):
        prompts = Prompts(({"prompt": "a", "text": "A"}, {"prompt": "b", "text": "B"}))
        assert prompts.take([1, 0, 1]) == {"prompt": ["b", "a", "b"], "text": ["B", "A", "B"]}


class TestTable:
    def test_duplicates_are_prompts_like_others(self):
        prompts = Prompts(({"prompt": "a"},) * 3)
        assert Counter(prompts.index(range(6), seed=0)) == {0: 2, 1: 2, 2: 2}

    def test_an_empty_one_is_refused(self):
        with pytest.raises(ValueError, match="empty"):
            Prompts(())

    @pytest.mark.parametrize("bad", [{"text": "x"}, {"prompt": 3}, {"prompt": "a", "more": 1}, {}])
    def test_a_row_with_other_columns_is_named(self, bad):
        with pytest.raises(ValueError, match="prompt row 1 has columns"):
            Prompts(({"prompt": "a"}, bad))


class TestLoad:
    def test_text_is_one_prompt_a_line(self, tmp_path):
        (tmp_path / "p.txt").write_text("a red fox\n\n  héllo \n", encoding="utf-8")
        assert load_prompts(str(tmp_path / "p.txt")).take([0, 1]) == {"prompt": ["a red fox", "héllo"]}

    def test_jsonl_is_one_object_a_line(self, tmp_path):
        rows = [{"prompt": "a", "text": "é"}, {"prompt": "b", "text": "x"}]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        prompts = load_prompts(str(tmp_path / "p.jsonl"), "heldout")
        assert prompts.columns == ["prompt", "text"]
        assert prompts.rows == tuple(rows)

    def test_of_a_file_a_fifth_of_the_distinct_prompts_is_held_out(self, tmp_path):
        """By the prompts alone: not by their order, nor by how often they stand there."""
        path, texts = tmp_path / "p.txt", [f"prompt {i}" for i in range(23)]
        path.write_text("\n".join(texts + texts[:7]))
        train, held = (load_prompts(str(path), split) for split in ("train", "heldout"))
        held_out = {r["prompt"] for r in held.rows}
        assert len(held_out) == 4
        assert {r["prompt"] for r in train.rows} == set(texts) - held_out
        assert len(train) + len(held) == 30
        assert len(load_prompts(str(path), "train", whole=True)) == len(load_prompts(str(path), "heldout", whole=True))
        path.write_text("\n".join(reversed(texts)))
        assert {r["prompt"] for r in load_prompts(str(path), "heldout").rows} == held_out

    def test_of_a_short_file_nothing_is_held_out_and_that_is_said(self, tmp_path, caplog):
        path = tmp_path / "p.txt"
        path.write_text("\n".join(f"prompt {i}" for i in range(9)))
        assert load_prompts(str(path), "train") == load_prompts(str(path), "heldout")
        assert "has 9 distinct prompts, too few to hold some out" in caplog.text
        caplog.clear()
        load_prompts(str(path), "heldout", whole=True)
        assert not caplog.text, "asked for"

    @pytest.mark.parametrize("source", ["scenes", "words", "scenes:pair"])
    def test_the_worlds_keep_their_held_out_captions_apart(self, source):
        train, held = ({r["prompt"] for r in load_prompts(source, split).rows} for split in ("train", "heldout"))
        assert train
        assert held
        assert not train & held

    def test_words_bring_the_text_to_be_read(self):
        for row in load_prompts("words").rows[:20]:
            assert row["prompt"] == words.caption(row["text"])

    @pytest.mark.parametrize("kinds", ["pair", "count,relation"])
    def test_scenes_can_be_narrowed_to_kinds(self, kinds):
        found = {scenes.parse(r["prompt"]).kind for r in load_prompts(f"scenes:{kinds}").rows}
        assert found == set(kinds.split(","))

    def test_kinds_have_about_equal_shares(self):
        shares = Counter(scenes.parse(r["prompt"]).kind for r in load_prompts("scenes").rows)
        assert max(shares.values()) < 1.5 * min(shares.values())

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("scenes:triple", r"unknown kind of scene \['triple'\]: choose from"),
            ("prompts.tsv", "give a file .*csv.*, or one of"),
            ("scene", "give a file .*geneval.*scenes"),
        ],
    )
    def test_a_source_that_cannot_be_is_refused(self, source, message):
        with pytest.raises(ValueError, match=message):
            load_prompts(source)

    def test_a_missing_file_is_named(self):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
            load_prompts("nowhere.txt")


WORDS = ["one\u2028cat", "two\x85cats\x0bin\x1ca row", 'a sign "OPEN", red']
FILES = {
    ".jsonl": lambda prompts: "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts),
    ".csv": lambda prompts: "prompt\n" + "".join('"{}"\n'.format(p.replace('"', '""')) for p in prompts),
    ".txt": lambda prompts: "".join(p + "\n" for p in prompts),
}


@pytest.mark.parametrize("suffix", FILES)
class TestText:
    """One reader for every format: marks, line ends and encodings mean the same in each."""

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
    def test_only_the_ends_of_lines_end_one(self, tmp_path, suffix, mark, end):
        """Inside a prompt stand characters that Unicode, or Python, call line ends too."""
        path = tmp_path / f"p{suffix}"
        path.write_bytes(mark + FILES[suffix](WORDS).replace("\n", end).encode())
        assert [row["prompt"] for row in read_rows(path)] == WORDS
        first = 2 if suffix == ".csv" else 1
        assert list(read_rows(path).places) == [f"{path}:{first + i}" for i in range(3)]

    @pytest.mark.parametrize(
        ("encoding", "message"),
        [
            ("utf-16", "is UTF-16: save it as UTF-8"),
            ("utf-32", "is UTF-32: save it as UTF-8"),
            ("utf-16-le", "is UTF-16 or no text: save it as UTF-8"),
            ("latin-1", r"is not UTF-8 \(byte 0xe9 in line \d; Windows-1252 or Latin-1\?\): save it as UTF-8"),
        ],
    )
    def test_another_encoding_is_named(self, tmp_path, suffix, encoding, message):
        path = tmp_path / f"p{suffix}"
        path.write_bytes(FILES[suffix](["a cat", "h\xe9llo"]).encode(encoding))
        with pytest.raises(ValueError, match=rf"p{suffix} {message}"):
            read_rows(path)


class TestRows:
    """Rows of files are read when asked for; what they are is what reading line by line tells."""

    LINES = (
        "a cat",
        "",
        "  a cat\t",
        "\x1c\u2003été\u2028dort\xa0",
        "\x85",
        "\x7f a",
        "ünder",
        *(f"p {i % 37}" for i in range(200)),
    )

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("last", ["", "\n", " "])
    @pytest.mark.parametrize("chunk", [7, 2**22])
    def test_lines_are_those_of_text_read_at_once(self, tmp_path, monkeypatch, end, last, chunk):
        monkeypatch.setattr("rlflow.envs.captions.files.CHUNK", chunk)
        path, text = tmp_path / "p.txt", "\n".join(self.LINES) + last
        path.write_bytes(text.replace("\n", end).encode())
        expected = {f"{path}:{i}": line.strip() for i, line in enumerate(io.StringIO(text), 1) if line.strip()}
        rows = read_rows(path)
        assert dict(zip(rows.places, (row["prompt"] for row in rows), strict=True)) == expected

    @pytest.mark.parametrize("suffix", FILES)
    def test_the_split_is_by_the_sha_256_of_distinct_prompts(self, tmp_path, suffix):
        """As it always was: runs that resume go on with the same lines."""
        path = tmp_path / f"p{suffix}"
        path.write_text(FILES[suffix]([line for line in self.LINES if line.strip()]), encoding="utf-8", newline="\n")
        every = [row["prompt"] for row in read_rows(path)]
        order = sorted(set(every), key=lambda text: hashlib.sha256(text.encode()).digest())
        held = set(order[: len(order) // 5])
        for split in ("train", "heldout"):
            mine = [i for i, text in enumerate(every) if (text in held) == (split == "heldout")]
            prompts = load_prompts(str(path), split)
            assert [row["prompt"] for row in prompts.rows] == [every[i] for i in mine]
            assert [prompts.place(k) for k in range(len(prompts))] == [read_rows(path).places[i] for i in mine]

    def test_a_file_in_use_is_read_once_and_one_that_changed_anew(self, tmp_path):
        path = tmp_path / "p.txt"
        path.write_text("a\nb\n")
        first = load_prompts(str(path))
        assert load_prompts(str(path), "heldout").rows.store is first.rows.store
        path.write_text("a\nc\n")
        assert load_prompts(str(path)).take([0, 1]) == {"prompt": ["a", "c"]}
        assert first.take([0, 1]) == {"prompt": ["a", "b"]}

    def test_many_lines_take_little_memory(self, tmp_path):
        """Twice the file and 60 bytes a line at the most, a dict and a text of which take 300."""
        path, num = tmp_path / "p.txt", 50_000
        path.write_text("".join(f"a cat beside dog number {i}\n" for i in range(num)))
        tracemalloc.start()
        prompts = load_prompts(str(path))
        prompts.index(range(4), seed=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(prompts) == num * 4 / 5
        assert peak < 2 * path.stat().st_size + 60 * num + 2**20

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    def test_columns_of_other_formats_stay_together(self, tmp_path, suffix):
        rows = [{"prompt": f"p {i}", "text": 'é "x", y' * (i % 3)} for i in range(40)]
        path = tmp_path / f"p{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "text"])
                writer.writeheader(), writer.writerows(rows)
        else:
            pytest.importorskip("pyarrow.parquet").write_table(
                pytest.importorskip("pyarrow").Table.from_pylist(rows), path
            )
        assert read_rows(path) == rows
        assert load_prompts(str(path), whole=True).take([3, 39]) == {n: [rows[3][n], rows[39][n]] for n in rows[0]}


class TestFileErrors:
    def test_a_line_that_is_not_json_is_named(self, tmp_path):
        path = tmp_path / "p.jsonl"
        path.write_text('{"prompt": "a"}\n\n{"prompt": b}\n')
        with pytest.raises(ValueError, match=r"p\.jsonl:3: not JSON \(.* at column 12\): '\{\"prompt\": b\}'"):
            load_prompts(str(path))

    @pytest.mark.parametrize("line", ['"a"', '["a"]', "3", "null"])
    def test_a_line_that_is_no_object_is_named(self, tmp_path, line):
        path = tmp_path / "p.jsonl"
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match=r"p\.jsonl:2: write one object a line"):
            load_prompts(str(path))

    def test_a_line_with_other_columns_is_named(self, tmp_path):
        path = tmp_path / "p.jsonl"
        path.write_text('{"prompt": "a"}\n\n{"promt": "b"}\n')
        with pytest.raises(ValueError, match=r"p\.jsonl:3 has columns \['promt'\]"):
            load_prompts(str(path))

    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_a_prompt_the_model_cannot_read_is_named_with_its_line(self, tmp_path, split):
        """Also in the middle of many, and after the file was split."""

        def tokenize(texts):
            if bad := [text for text in texts if text in wrong]:
                raise ValueError(f"unknown word {bad[0]!r}")

        path, texts = tmp_path / "p.txt", [f"prompt {i}" for i in range(3000)]
        path.write_text("\n".join(texts))
        prompts = load_prompts(str(path), split)
        wrong = {prompts.rows[-3]["prompt"], prompts.rows[-1]["prompt"]}
        line = texts.index(prompts.rows[-3]["prompt"]) + 1
        with pytest.raises(ValueError, match=rf"p\.txt:{line}: 'prompt {line - 1}': unknown word"):
            prompts.check(tokenize)
        wrong = set()
        prompts.check(tokenize)

    def test_every_prompt_is_read_once(self):
        seen: list[str] = []
        Prompts(({"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})).check(seen.extend)
        assert sorted(seen) == ["a", "b"]
