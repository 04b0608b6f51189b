"""Generation: the cache changes nothing, rows don't see each other, and the options mean what they mean elsewhere."""

import math

import pytest
import torch

from extras.cli import UserError
from extras.generation import continue_texts, filter_logits, new_cache, pad_left, penalize, stream
from extras.tokenizer import load_tokenizer
from train_gpt2 import GPT, GPTConfig

OPTIONS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "penalty": {"temperature": 0, "repetition_penalty": 1.5},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.8, "stop": 7},
}
FILTERS = [(0, 1.0), (1, 1.0), (5, 1.0), (2000, 1.0), (0, 0.9), (0, 0.1), (0, 0.999), (50, 0.5), (3, 0.9)]


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights, scaled up so that the next id is neither certain nor a matter of chance. 10 padding ids."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=60, n_layer=2, n_head=2, n_embd=16, n_tokens=50)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
        model.transformer.wte.weight[50:] = 100.0  # padding ids would win every draw
    return model


def seeded(options: dict) -> dict:
    return options | {"generator": torch.Generator().manual_seed(3)}


def plain(model, idx, n, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=None, generator=None):
    """The loop as one would first write it: no cache, the whole text again for each id, one filter after the other."""
    ended = [False] * len(idx)
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1, :50].detach().clone()
        for row, ids in zip(logits, idx):
            for i in set(ids.tolist()) if repetition_penalty != 1 else ():
                row[i] = row[i] / repetition_penalty if row[i] > 0 else row[i] * repetition_penalty
        logits /= temperature or 1.0
        for row in logits:
            order = row.argsort(descending=True)
            row[order[top_k or 50 :]] = -math.inf
            if top_p < 1:
                fewest = 1 + int((row.softmax(-1)[order].cumsum(-1) < top_p).sum())
                row[order[fewest:]] = -math.inf
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        for i, end in enumerate(ended):
            token[i] = stop if end else token[i]
            ended[i] = end or int(token[i]) == stop
        idx = torch.cat([idx, token], dim=1)
        if all(ended):
            break
    return idx


@pytest.mark.parametrize("length", [1, 9, 24, 30])
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_generation_is_the_plain_loop(model, name, length):
    idx = torch.randint(0, 50, (3, length), generator=torch.Generator().manual_seed(length))
    ours = model.generate(idx, 30, **seeded(OPTIONS[name]))  # over the edge of the window of 24
    assert torch.equal(ours, plain(model, idx, 30, **seeded(OPTIONS[name])))
    assert int(ours.max()) < 50


@pytest.mark.parametrize("name", ["greedy", "penalty"])
def test_unequal_prompts_in_a_batch_are_each_alone(model, name):
    prompts = [torch.randint(0, 50, (n,)).tolist() for n in (3, 11, 1, 30)]  # the last one alone fills the window
    idx, padding = pad_left(prompts)
    together = model.generate(idx, 25, padding=padding, **OPTIONS[name])
    for prompt, begin, row in zip(prompts, padding.tolist(), together):
        assert row[begin:].tolist() == model.generate(torch.tensor([prompt]), 25, **OPTIONS[name])[0].tolist()


def test_what_stands_in_the_padding_does_not_matter(model):
    prompts = [[3, 4], [5, 6, 7, 8, 9]]
    idx, padding = pad_left(prompts)
    assert idx.shape == (2, 5) and padding.tolist() == [3, 0]
    options = OPTIONS["all"] | {"stop": None}
    one = model.generate(idx, 10, padding=padding, **seeded(options))
    idx[0, :3] = torch.tensor([11, 12, 13])
    assert torch.equal(one[:, 5:], model.generate(idx, 10, padding=padding, **seeded(options))[:, 5:])


def test_logits_of_padded_rows_equal_those_of_the_text_alone(model):
    prompts = [[3, 4], [5, 6, 7, 8, 9]]
    idx, padding = pad_left(prompts)
    seen = {}
    head = model.head
    model.head = lambda x: seen.setdefault("logits", head(x))
    try:
        next(iter(stream(model, idx, 1, padding=padding)))
    finally:
        del model.head
    for prompt, logits in zip(prompts, seen["logits"]):
        torch.testing.assert_close(logits, model(torch.tensor([prompt]))[0][0, -1, :50], atol=1e-4, rtol=1e-5)


def test_compiled_generation_is_the_same_and_compiles_once_for_prompts_and_once_for_tokens(model, monkeypatch):
    idx = torch.randint(0, 60, (2, 5))
    expected = model.generate(idx, 20, temperature=0)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(model, "features", torch.compile(model.features, backend=backend, fullgraph=True), raising=True)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    assert 2 <= len(graphs) <= 3  # the prompt, a token; and a token with whatever past


def test_stop_ends_a_row_and_the_stream(model):
    idx = torch.tensor([[1, 2], [3, 4], [5, 6]])
    free = model.generate(idx, 20, temperature=0)[:, 2:]
    stop = int(free[0, 4])
    stopped = model.generate(idx, 20, temperature=0, stop=stop)[:, 2:]
    ends = [row.index(stop) if stop in row else 20 for row in free.tolist()]
    assert stopped.shape[1] == min(20, max(ends) + 1)
    for before, after, end in zip(free.tolist(), stopped.tolist(), ends):
        assert after == (before[: end + 1] + [stop] * 20)[: len(after)]


def test_a_seed_is_a_text_and_a_stream_is_what_generate_gives(model):
    idx = torch.tensor([[1, 2, 3]])
    texts = [model.generate(idx, 20, generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    tokens = stream(model, idx, 20, generator=torch.Generator().manual_seed(1))
    assert texts[0][0][3:] == [int(token) for token in tokens]


def test_text_is_continued_as_its_ids_are_up_to_end_of_text():
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=64, vocab_size=384, n_layer=2, n_head=2, n_embd=32, n_tokens=257)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() == 2 else 1)
    tokenizer, lengths = load_tokenizer("bytes"), set()
    for seed in range(8):
        for text, begin in (("né", ""), ("", "<|endoftext|>"), ("a", "<|endoftext|>")):
            ids = [256] * bool(begin) + tokenizer.encode(text)
            options = {"top_k": 9, "temperature": 9.0}
            torch.manual_seed(seed)
            new = model.generate(torch.tensor([ids]), 40, stop=256, **options)[0, len(ids) :].tolist()
            new = new[: new.index(256)] if 256 in new else new
            torch.manual_seed(seed)
            assert model.generate(f"{begin}{text}", 40, **options) == text + tokenizer.decode(new)
            lengths.add(len(new))
    assert max(lengths) == 40 and min(lengths) < 40  # some come to an end
    prompts = ["a", "the second", "<|endoftext|>", "and a third"]
    alone = [model.generate(text, 9, temperature=0) for text in prompts]
    assert continue_texts(model, prompts, 9, temperature=0) == alone and len({text[-5:] for text in alone}) > 2


def test_text_needs_a_known_tokenizer(model):
    with pytest.raises(UserError, match="the model has 50 tokens, and it is not known which"):
        model.generate("Once upon a time")


def test_filters_equal_those_of_transformers():
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(4, 997, generator=generator) * scale for scale in (0.1, 1, 4, 20)])
    logits[:, 5] = logits[:, 9] = logits.max(dim=1).values  # two that are equally likely, at the very top
    seen = torch.randint(0, 997, (16, 40), generator=generator)
    for penalty in (1.0, 0.7, 1.3):
        ours = logits.clone()
        penalize(ours, seen, penalty)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
        assert torch.equal(ours, theirs)
        for top_k, top_p in FILTERS:
            filtered = filter_logits(ours / 0.8, top_k, top_p)
            expected = TemperatureLogitsWarper(0.8)(seen, theirs)
            expected = TopKLogitsWarper(top_k)(seen, expected) if top_k else expected
            expected = TopPLogitsWarper(top_p)(seen, expected) if top_p < 1 else expected
            kept = filtered > -math.inf
            assert torch.equal(filtered[kept], (ours / 0.8)[kept])
            # sorted: of ids that are equally likely either may be the last one of the nucleus
            assert torch.equal(filtered.sort().values, expected.sort().values), (penalty, top_k, top_p)
    nearly_none = filter_logits(logits, 0, 1e-7)
    assert ((nearly_none > -math.inf).sum(dim=1) == 1).all()
    assert torch.equal(nearly_none.max(dim=1).values, logits.max(dim=1).values)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UserError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 5)
    with pytest.raises(UserError, match="empty"):
        idx, padding = pad_left([[1, 2], []])
        model.generate(idx, 5, padding=padding)


def test_the_cache_has_the_dtype_that_attention_sees(model):
    device, idx = torch.device("cpu"), torch.tensor([[1, 2, 3], [9, 8, 7]])
    assert new_cache(model, 2, 5, device).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert new_cache(model, 2, 5, device).dtype == torch.bfloat16
        assert model.generate(idx, 15, temperature=0).shape == (2, 18)
