"""What the weight differences' tests share: models that were trained, the original's arithmetic, equality of bits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.formats.diff.recovering import RecoverConfig, recover

TABLE = "model.layers.{}.self_attn.rotary_emb.inv_freq"
Tensors = dict[str, torch.Tensor]


def load(folder: Path, dtype: torch.dtype | str = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def add_pad_rows(model, num_rows: int) -> None:
    """The original's resizing: new input and output rows are the mean of those before."""
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[old:] = table[:old].mean(dim=0, keepdim=True)


def train(model, num_steps: int) -> None:
    """Steps as large as fine-tuning's in all, so that float32 differences lose bits."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(num_steps):
        ids = torch.randint(model.config.vocab_size, (2, 12), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def read_all(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.dtype.itemsize])


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A model folder with each tensor changed."""
    shutil.copytree(source, target)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in read_all(source).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def recovered(raw: Path, diff: Path, target: Path, **options) -> Tensors:
    recover(RecoverConfig(path_raw=raw, path_diff=diff, path_tuned=target, **{"test_inference": False, **options}))
    return read_all(target)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def original_difference(raw: Path, tuned: Path) -> Tensors:
    """make_diff as it was: both models in memory, [PAD] rows, state dict minus state dict."""
    base, model = load(raw), load(tuned)
    add_pad_rows(base, model.config.vocab_size)
    return {name: tensor - base.state_dict()[name] for name, tensor in model.state_dict().items()}


def frequencies(folder: Path) -> torch.Tensor:
    config = load(folder).config
    width = config.hidden_size // config.num_attention_heads
    return 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)


def original_recovery(raw: Path, difference: Tensors) -> Tensors:
    """recover as it was, over the state dict of transformers 4.28, in its order, rotary tables included."""
    base = load(raw)
    add_pad_rows(base, base.config.vocab_size + 1)
    tensors = {**base.state_dict(), **{TABLE.format(layer): frequencies(raw) for layer in range(2)}}
    layer = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
             "self_attn.rotary_emb.inv_freq", "mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight",
             "input_layernorm.weight", "post_attention_layernorm.weight"]  # fmt: skip
    order = ["model.embed_tokens.weight", *(f"model.layers.{i}.{n}" for i in range(2) for n in layer),
             "model.norm.weight", "lm_head.weight"]  # fmt: skip
    assert set(order) == set(tensors)
    return {name: difference[name] + tensors[name] if name in difference else tensors[name] for name in order}


def both_commands(tmp_path: Path, raw: Path, tuned: Path, diff: Path) -> list[Callable[[], object]]:
    return [
        lambda: make_diff(DiffConfig(path_raw=raw, path_tuned=tuned, path_diff=tmp_path / "new")),
        lambda: recovered(raw, diff, tmp_path / "back"),
    ]
