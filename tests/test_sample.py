"""sample.py as it is called: what it prints, what it exports, and one line for a mistake."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT, USER_ERRORS

import sample
from extras.cli import parse, run
from extras.tokenizer import encode_chat, load_tokenizer, printable
from train_gpt2 import GPT, GPTConfig

LINE = "-" * 80


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory with two checkpoints of a model of bytes; the newer one is the one to sample from."""
    folder = tmp_path_factory.mktemp("log")
    for step in (5, 10):
        torch.manual_seed(step)
        model = GPT(GPTConfig(128, 384, 2, 2, 32, n_tokens=257))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6 if parameter.dim() == 2 else 1)
        saved = {"model": model.state_dict(), "model_config": vars(model.config), "step": step}
        torch.save(saved, folder / f"ckpt_{step:06d}.pt")
    return folder


def call(run_dir, *argv: str) -> None:
    sample.main(parse(sample.Config, "", ["--model", str(run_dir), "--device", "cpu", *argv]))


def test_samples_are_those_of_the_newest_checkpoint(run_dir, capsys):
    call(run_dir, "--prompt", "abc", "--temperature", "0", "--max_new_tokens", "20")
    model, tokenizer = GPT.from_checkpoint(run_dir / "ckpt_000010.pt"), load_tokenizer("bytes")
    ids = model.generate(torch.tensor([list(b"abc")]), 20, temperature=0, stop=256)[0].tolist()
    ids = ids[: ids.index(256)] if 256 in ids else ids
    assert capsys.readouterr().out == f"{printable(tokenizer.decode(ids))}\n{LINE}\n"


def test_several_prompts_of_a_file_are_each_as_alone(run_dir, tmp_path, capsys):
    prompts = ["one", "number two,\nof two lines", "3"]
    (tmp_path / "prompts.txt").write_text("\n---\n".join(prompts) + "\n")
    options = ["--temperature", "0", "--max_new_tokens", "12"]
    call(run_dir, "--prompt_file", str(tmp_path / "prompts.txt"), "--num_samples", "2", *options)
    together = capsys.readouterr().out
    alone = ""
    for prompt in prompts:
        call(run_dir, "--prompt", prompt, *options)
        alone += 2 * capsys.readouterr().out
    assert together == alone and together.startswith("one")


def test_more_samples_than_memory_holds_are_drawn_in_batches(run_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n---\nnumber two\n---\n3\n", encoding="utf-8-sig")
    options = ["--prompt_file", str(tmp_path / "prompts.txt"), "--num_samples", "3", "--temperature", "0"]
    call(run_dir, *options)
    together, batches, draw = capsys.readouterr().out, [], sample.continue_texts
    assert together.startswith("one") and together.count(LINE) == 9
    monkeypatch.setattr(sample, "continue_texts", lambda *a, **k: batches.append(len(a[1])) or draw(*a, **k))
    kept = 8 * 2 * 32 * 110 + 24 * 257  # bytes of a sample: keys and values of 110 positions, and logits
    monkeypatch.setattr(sample, "SAMPLES_BYTES", 4 * kept + 1)
    call(run_dir, *options)
    assert capsys.readouterr().out == together and batches == [4, 4, 1]


def test_ctrl_c_ends_the_line_and_the_program(run_dir, capsys, monkeypatch):
    def interrupted(*_, **__):
        yield torch.tensor([[104]])
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "stream", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(sample.main, sample.Config, "", ["--model", str(run_dir), "--device", "cpu", "--prompt", "o", "--stream"])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, printed.err) == (130, "oh\n", "")


@pytest.mark.skipif(os.name != "posix", reason="a pipe that nobody reads is another error there")
def test_a_reader_that_has_had_enough_is_no_error(run_dir):
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(run_dir), "--device", "cpu", "--prompt", "o"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_a_stream_prints_what_is_printed_at_once(run_dir, capsys):
    options = ["--prompt", "né", "--max_new_tokens", "40", "--top_k", "0", "--temperature", "1.5"]
    call(run_dir, *options, "--seed", "3")
    at_once = capsys.readouterr().out
    call(run_dir, *options, "--seed", "3", "--stream")
    assert capsys.readouterr().out == at_once and at_once.endswith(f"\n{LINE}\n")
    call(run_dir, *options, "--seed", "4")
    assert capsys.readouterr().out != at_once


def test_a_character_of_many_tokens_is_streamed_whole(run_dir, monkeypatch):
    text = "naïve 🦙 東京 \x00"
    drawn = [*text.encode(), 0xF0, 0x9F, 256]  # the end comes in the middle of a character
    monkeypatch.setattr(sample, "stream", lambda *_, **__: (torch.tensor([[i]]) for i in drawn))
    model = GPT.from_checkpoint(run_dir / "ckpt_000005.pt")
    pieces = list(sample.stream_samples(model, load_tokenizer("bytes"), ["p"], 1, {}))
    assert "".join(pieces) == f"p{text}\N{REPLACEMENT CHARACTER}\n{LINE}\n"
    assert pieces[1:4] == ["n", "a", ""] and "🦙" in pieces


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_an_empty_prompt_and_end_of_text_begin_a_document(run_dir, capsys, options):
    options = [*options, "--temperature", "0", "--max_new_tokens", "9"]
    model, tokenizer = GPT.from_checkpoint(run_dir / "ckpt_000010.pt"), load_tokenizer("bytes")
    for prompt, begin in (("", ""), ("<|endoftext|>", ""), ("<|endoftext|>ab", "ab")):
        call(run_dir, "--prompt", prompt, *options)
        new = model.generate(torch.tensor([[256, *begin.encode()]]), 9, temperature=0, stop=256)[0, 1:].tolist()
        expected = printable(tokenizer.decode(new[: new.index(256)] if 256 in new else new))
        assert capsys.readouterr().out == f"{expected}\n{LINE}\n"
    call(run_dir, "--prompt", "a<|endoftext|>", *options)
    assert capsys.readouterr().out.startswith("a<|endoftext|>"), "elsewhere it is ordinary text"


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_control_characters_are_escaped(run_dir, capsys, monkeypatch, options):
    drawn = [torch.tensor([[i]]) for i in b"\x00a\x13\x1b[2J\tb\r\n" + "\x9bé".encode()]
    monkeypatch.setattr("extras.generation.stream", lambda *_, **__: iter(drawn))
    monkeypatch.setattr("sample.stream", lambda *_, **__: iter(drawn))
    call(run_dir, "--prompt", "p\x07", *options)
    assert capsys.readouterr().out == f"p\\x07\\x00a\\x13\\x1b[2J\tb\\x0d\n\\x9bé\n{LINE}\n"


def test_a_run_without_a_checkpoint_is_said_to_be_one(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 10.9\n")
    for source in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(USER_ERRORS, match="is a run without a checkpoint; it saves one every --save_every steps"):
            call(source, "--prompt", "a")


def test_a_vocabulary_with_added_tokens_is_sampled_and_exported(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = GPT(GPTConfig(32, 50260, 1, 1, 8))
    with torch.no_grad():
        model.transformer.wte.weight[50258] = 1
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)  # whatever came before, 50258 is the likeliest
    torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, tmp_path / "ckpt.pt")
    call(tmp_path, "--prompt", "a", "--temperature", "0", "--max_new_tokens", "2")
    assert capsys.readouterr().out == f"a<|50258|><|50258|>\n{LINE}\n"
    call(tmp_path, "--export", str(tmp_path / "exported"))
    theirs, tokenizer = (kind.from_pretrained(tmp_path / "exported") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert theirs.config.vocab_size == 50260 and theirs.config.eos_token_id == tokenizer.eos_token_id == 50256
    ids = torch.tensor([tokenizer("Hello world").input_ids])
    torch.testing.assert_close(theirs(ids).logits, model(ids)[0])


def test_samples_end_at_end_of_text(run_dir, capsys, monkeypatch):
    def ending(model, idx, n, **options):
        assert options["stop"] == 256
        return iter(torch.tensor([[[104]], [[105]], [[256]], [[256]]]))

    monkeypatch.setattr("extras.generation.stream", ending)
    call(run_dir, "--prompt", "o")
    assert capsys.readouterr().out == f"ohi\n{LINE}\n"


def test_without_a_prompt_it_asks(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd\n\nnever\n"))
    call(run_dir, "--temperature", "0", "--max_new_tokens", "3")
    samples = capsys.readouterr().out.split(f"\n{LINE}\n")  # no "> " among them: nobody sits at a terminal
    assert [text[:2] for text in samples] == ["ab", "cd", ""]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\n\xff\n"), "utf-8"))
    with pytest.raises(USER_ERRORS, match="what was typed is not text"):
        call(run_dir, "--max_new_tokens", "3")


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


@pytest.fixture
def scripted(monkeypatch):
    """A model that gives these answers, in which ^ is a Ctrl-C; it notes what it was given and how much it may say."""
    script = SimpleNamespace(answers=[], given=[], most=[])

    def stream(_model, idx, max_new_tokens, *, stop, **_):
        script.given.append(load_tokenizer("bytes").decode(idx[0]).replace("<|endoftext|>", "|"))
        script.most.append(max_new_tokens)
        for token in [*script.answers[len(script.given) - 1].encode(), stop]:
            if token == ord("^"):
                raise KeyboardInterrupt
            yield torch.tensor([[token]])

    monkeypatch.setattr(sample, "stream", stream)
    return script


def converse(run_dir, monkeypatch, typed: str, *argv: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    call(run_dir, "--format", "chat", *argv)


def test_a_conversation_remembers_and_an_empty_line_ends_it(run_dir, scripted, monkeypatch, capsys):
    scripted.answers = [" Hey.", "Ja \x1b", "  Two\nlines "]
    converse(run_dir, monkeypatch, "Hi\nü?\nx\n\nnever\n", "--max_new_tokens", "7", "--system", "S")
    begin = "|System: S\n\nUser: Hi\n\nAssistant:"
    second = begin + " Hey.|\n\nUser: ü?\n\nAssistant:"
    assert scripted.given[:2] == [begin, second]
    assert capsys.readouterr().out == "Hey.\nJa \\x1b\n Two\nlines \n" and scripted.most == [7, 7, 7]


def test_the_oldest_turns_are_left_out_and_that_is_said_once(run_dir, scripted, monkeypatch, capsys):
    scripted.answers = [f" {i}" for i in range(6)]
    typed = ["a", "b", "x" * 100, "c", "d", "e", "f"]  # 128 bytes are seen, 8 are for the answer
    converse(run_dir, monkeypatch, "\n".join(typed) + "\n", "--max_new_tokens", "8", "--system", "S")
    turns = [f"\n\nUser: {text}\n\nAssistant:" for text in (*typed[:2], *typed[3:])]
    for i, (given, first) in enumerate(zip(scripted.given, (0, 0, 0, 0, 1, 2), strict=True)):
        before = "".join(f"{turns[k]} {k}|" for k in range(first, i))
        assert given == f"|System: S{before}{turns[i]}" and len(given) <= 120
        assert first == 0 or len(given) + len(f"{turns[first - 1]} {first - 1}|") > 120, "it would have fitted"
    said = capsys.readouterr()
    assert said.out == "0\n1\n2\n3\n4\n5\n"
    assert said.err.count("the model sees 128 tokens; the oldest turns are left out now\n") == 1
    assert said.err.count("too long: 130 tokens, and only up to 120 leave room for an answer\n") == 1


def test_ctrl_c_stops_the_answer_and_then_the_program(run_dir, scripted, monkeypatch, capsys):
    scripted.answers = [" I thi^nk so", " Yes."]
    typed = iter(["a", "b"])

    def type_in(_):
        if (line := next(typed, None)) is None:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", type_in)
    with pytest.raises(SystemExit) as ended:
        run(sample.main, sample.Config, "", ["--model", str(run_dir), "--device", "cpu", "--format", "chat"])
    assert ended.value.code == 130 and capsys.readouterr().out == "I thi\nYes.\n\n"
    assert scripted.given[1] == "|User: a\n\nAssistant: I thi|\n\nUser: b\n\nAssistant:" and scripted.most == [64, 64]


def test_a_conversation_by_a_pipe(run_dir):
    """In a process of its own, a message a line; the answers are those that the model's own ids give."""
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(run_dir), "--device", "cpu", "--format", "chat"]
    command += ["--temperature", "0", "--max_new_tokens", "6"]
    done = subprocess.run(command, input="Hi\nHo", capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    model, tokenizer, messages, expected = GPT.from_pretrained(run_dir), load_tokenizer("bytes"), [], ""
    for question in ("Hi", "Ho"):
        messages.append(("user", question))
        ids = encode_chat(tokenizer, messages)
        new = model.generate(torch.tensor([ids]), 6, temperature=0, stop=256)[0, len(ids) :].tolist()
        answer = tokenizer.decode(new[: new.index(256)] if 256 in new else new).removeprefix(" ")
        messages.append(("assistant", answer))
        expected += printable(answer) + "\n"
    assert done.stdout == expected and done.stderr.count("\n") == 1


def test_export_writes_a_directory_that_is_read_again(run_dir, tmp_path, capsys):
    call(run_dir, "--export", str(tmp_path / "exported"))
    assert "llama.cpp's converter knows no tokenizer of bytes" in capsys.readouterr().out
    call(tmp_path / "exported", "--prompt", "abc", "--temperature", "0")
    exported = capsys.readouterr().out
    call(run_dir, "--prompt", "abc", "--temperature", "0")
    assert exported == capsys.readouterr().out
    with pytest.raises(USER_ERRORS, match="is there already"):
        call(run_dir, "--export", str(tmp_path / "exported"))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--prompt", "a", "--prompt_file", "b"], "give one of them"),
        (["--prompt_file", "nowhere.txt"], "can't read --prompt_file nowhere.txt"),
        (["--prompt_file", "EMPTY"], "prompt 1 of 1 is empty"),
        (["--prompt_file", "HOLE"], "prompt 2 of 3 is empty"),
        (["--prompt", "a", "--top_p", "0"], "--top_p is 0"),
        (["--prompt", "a", "--top_p", "nan"], "--top_p is nan"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan"),
        (["--prompt", "a", "--temperature", "1e-40"], "0 for the likeliest token, or at least 0.001"),
        (["--prompt", "a", "--repetition_penalty", "inf"], "--repetition_penalty is inf"),
        (["--prompt", "a", "--num_samples", "0"], "--num_samples is 0"),
        (["--prompt", "a", "--max_new_tokens", str(2**31)], "--max_new_tokens is 2147483648; .* below 2\\^31"),
        (["--prompt", "a", "--top_k", "-1"], "--top_k is -1"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus"),
        (["--prompt", "a", "--system", "b"], "--system goes with --format chat only"),
        (["--prompt", "a", "--format", "chat", "--num_samples", "2"], "--num_samples is 2; .* one answer"),
    ],
)
def test_mistakes_are_named(run_dir, tmp_path, argv, words):
    for name, text in (("EMPTY", "\n"), ("HOLE", "a\n---\n---\nb")):
        (tmp_path / name).write_text(text)
    with pytest.raises(USER_ERRORS, match=words):
        call(run_dir, *[str(tmp_path / word) if word in ("EMPTY", "HOLE") else word for word in argv])


def test_a_model_of_unknown_tokens_is_exported_and_not_sampled(tmp_path, capsys):
    GPT(GPTConfig(32, 65, 1, 1, 8)).save_pretrained(str(tmp_path / "a"))
    call(tmp_path / "a", "--export", str(tmp_path / "b"))
    assert "without a tokenizer" in capsys.readouterr().out
    with pytest.raises(USER_ERRORS, match="has 65 tokens"):
        call(tmp_path / "a", "--prompt", "a")


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    """In a process of its own, in a directory without a run: the default, log, isn't there."""
    command = [sys.executable, str(ROOT / "sample.py"), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("sample.py: error: no run in log/") and done.stderr.count("\n") == 1
