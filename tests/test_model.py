"""The model is GPT-2: logits, losses and gradients of transformers' own, from the same weights; padding is no token."""

import math

import pytest
import torch

import extras.loss
import train_gpt2
from extras import pretrained
from train_gpt2 import GPT, GPTConfig

SHAPES = {  # the proportions of the four sizes, at small widths
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 32},
    "gpt2-medium": {"n_layer": 4, "n_head": 2, "n_embd": 64},
    "gpt2-large": {"n_layer": 5, "n_head": 5, "n_embd": 40},
    "gpt2-xl": {"n_layer": 6, "n_head": 5, "n_embd": 25},
}


def reference(shape: dict, vocab_size=300, block_size=32, seed=0):
    """transformers' GPT-2 with random weights, biases and LayerNorms included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=block_size, **shape, **none, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def ours_like(theirs) -> GPT:
    """Our model with those weights, set without any code of ours that reads or writes files."""
    c = theirs.config
    model = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
    state = {}
    for name, tensor in theirs.state_dict().items():
        conv1d = name.endswith(".weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        state[name] = tensor.T if conv1d else tensor
    model.load_state_dict(state, strict=True)
    return model


def test_the_loss_of_the_file_alone_is_the_same(monkeypatch):
    model = GPT(GPTConfig(64, 304, 2, 2, 32, n_tokens=300))
    x = torch.randint(300, (2, 32))
    y = x.roll(-1, 1).masked_fill(x < 100, -100)
    losses, grads = [], []
    for head_loss in (extras.loss.head_loss, train_gpt2.plain_loss):
        monkeypatch.setattr(train_gpt2, "head_loss", head_loss)
        model.zero_grad()
        losses.append(model(x, y)[1])
        losses[-1].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size, longest_sum", [(size, 10**6) for size in SHAPES] + [(min(SHAPES), 128)])
def test_logits_losses_and_gradients_are_those_of_transformers(size, longest_sum, monkeypatch):
    monkeypatch.setitem(extras.loss.LONGEST_SUM, "cpu", longest_sum)  # a Mac's gradients are added up in parts
    theirs = reference(SHAPES[size])
    ours = ours_like(theirs)
    ids = torch.randint(0, 300, (3, 33), generator=torch.Generator().manual_seed(1))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[0, :7] = y[2, 20:] = -100
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, atol=1e-5, rtol=0)
    ours_loss = ours(x, y)[1]
    logits = theirs(x).logits
    theirs_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
    torch.testing.assert_close(ours_loss, theirs_loss, atol=1e-5, rtol=0)
    ours_loss.backward()
    theirs_loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = pretrained.transpose_conv1d(expected)
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_loss_at_initialisation_is_ln_v(vocab_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=vocab_size, n_layer=2, n_head=4, n_embd=64))
    ids = torch.randint(0, 50257, (4, 65))
    with torch.no_grad():
        loss = float(model(ids[:, :-1], ids[:, 1:])[1])
    assert abs(loss / math.log(50257) - 1) < 0.01


def test_initial_weights_have_the_paper_s_variance():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(float(parameter.detach().std()) / std - 1) < 0.02, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.fixture(scope="module")
def padded() -> tuple[GPT, GPT]:
    """A model of 50 tokens, and the same padded to 64 with rows that would win every draw and fill every softmax."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))
    padded = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16, n_tokens=50))
    state = plain.state_dict()
    rows = torch.cat([state["transformer.wte.weight"], torch.full((14, 16), 30.0)])
    padded.load_state_dict(state | {"transformer.wte.weight": rows, "lm_head.weight": rows})
    return plain, padded


def test_padding_has_no_probability_and_no_gradient(padded):
    plain, padded = padded
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(2))
    logits = padded(ids[:, :-1])[0]
    assert (logits[..., 50:] == -math.inf).all()
    assert torch.equal(logits[..., :50], plain(ids[:, :-1])[0])
    losses = [model(ids[:, :-1], ids[:, 1:])[1] for model in (plain, padded)]
    assert torch.equal(*losses)
    padded.zero_grad()
    losses[1].backward()
    assert (padded.transformer.wte.weight.grad[50:] == 0).all()
    assert padded.transformer.wte.weight.grad[:50].abs().max() > 0


def test_padding_is_never_drawn(padded):
    plain, padded = padded
    idx = torch.zeros(8, 1, dtype=torch.long)
    drawn = [model.generate(idx, 15, generator=torch.Generator().manual_seed(0)) for model in (plain, padded)]
    assert torch.equal(*drawn) and int(drawn[1].max()) < 50
    assert int(padded.generate(idx, 15, temperature=0).max()) < 50


def test_vocab_50304_is_gpt2_s_50257_padded():
    assert GPTConfig(vocab_size=50304).n_tokens == 50257
    assert GPTConfig(vocab_size=50257).n_tokens == 50257
    assert GPTConfig(vocab_size=384, n_tokens=257).n_tokens == 257


def test_too_long_a_text_is_refused(padded):
    with pytest.raises(ValueError, match=r"17 tokens .* 16"):
        padded[0](torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(AssertionError, match="need a mask"):
        padded[0].features(torch.zeros(1, 3, dtype=torch.long), start=2)


def test_a_model_can_be_exported_and_traced_for_any_length():
    model = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=1, n_head=2, n_embd=16)).eval().requires_grad_(False)
    T = torch.export.Dim("T", min=2, max=64)
    exported = torch.export.export(model, (torch.zeros(1, 8, dtype=torch.int64),), dynamic_shapes=({1: T},)).module()
    traced = torch.jit.trace(lambda idx: model(idx)[0], torch.zeros(1, 8, dtype=torch.int64))
    for length in (2, 7, 64):
        idx = torch.randint(50, (1, length))
        torch.testing.assert_close(exported(idx)[0], model(idx)[0])
        torch.testing.assert_close(traced(idx), model(idx)[0])
