"""A GGUF file, written as a stream and read back: the model's numbers, its tokenizer, its tensors."""

import contextlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError
from alpaca.files.progress import byte_bar
from alpaca.formats.gguf.tensors import Placed, encoded_blocks, import_gguf
from alpaca.formats.gguf.tokenizer import Vocabulary

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def add_model(writer, model: ModelDescription, *, name: str, outtype: str) -> None:
    """What llama.cpp must know of the model besides its tensors."""
    gguf = import_gguf()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[outtype]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_context)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.ffn_width)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_rope_freq_base(model.rope.theta)
    if model.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(model.rope.numbers["factor"]))


def add_vocabulary(writer, vocabulary: Vocabulary) -> None:
    """The tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.token_ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


@dataclass
class _Stream:
    """What GGUFWriter.write_tensor_data asks of an array, `nbytes` and `tofile`, without the array."""

    placed: Placed
    progress: Callable[[int], object]
    checksum: int = field(default=0, init=False)

    @property
    def nbytes(self) -> int:
        return self.placed.num_bytes

    def tofile(self, file) -> None:
        written = 0
        for block in encoded_blocks(self.placed):
            file.write(block)
            self.checksum = zlib.crc32(block, self.checksum)
            written += len(block)
            self.progress(len(block))
        assert written == self.nbytes, self.placed


def write_tensors(writer, plan: list[Placed]) -> list[int]:
    """Write the file, fsynced and closed, and return each tensor's CRC-32."""
    gguf = import_gguf()
    for placed in plan:
        kind = gguf.GGMLQuantizationType[placed.kind.upper()]
        writer.add_tensor_info(placed.name, placed.shape, None, placed.num_bytes, raw_dtype=kind)
    checksums = []
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with byte_bar(sum(placed.num_bytes for placed in plan), "exporting") as bar:
            for placed in plan:
                stream = _Stream(placed, bar.update)
                writer.write_tensor_data(stream)
                checksums.append(stream.checksum)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        with contextlib.suppress(OSError):  # of a full disk; it was raised above
            writer.close()
    return checksums


def verify(path: Path, writer, plan: list[Placed], checksums: list[int]) -> None:
    """Read the file as others will and compare all of it with what was meant. Raises InputError."""
    reader = _open_reader(path)
    wrong = [key for key, value in writer.kv_data[0].items() if not _reads_back(reader.get_field(key), value.value)]
    with byte_bar(sum(placed.num_bytes for placed in plan), "verifying") as bar:
        for placed, checksum, tensor in zip(plan, checksums, reader.tensors, strict=True):
            said = (tensor.name, tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name.lower())
            if said != (placed.name, placed.shape, placed.kind) or zlib.crc32(tensor.data) != checksum:
                wrong.append(placed.name)
            bar.update(placed.num_bytes)
    if wrong:
        raise InputError(
            f"the file reads back otherwise than it was written ({', '.join(wrong[:5])}): the disk may be failing. "
            "Nothing was changed; write it to another disk"
        )


def _open_reader(path: Path):
    """gguf's reader on plain arrays: it keeps two for each token and merge, which as np.memmap weigh thrice as much."""
    gguf = import_gguf()

    class Reader(gguf.GGUFReader):
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, mapped) -> None:
            self._data = mapped.view(type=np.ndarray)

    return Reader(path)


def _reads_back(found, meant: object) -> bool:
    if found is None:
        return False
    contents = found.contents()
    if isinstance(meant, float) or (isinstance(meant, list) and meant and isinstance(meant[0], float)):
        return bool(torch.equal(torch.tensor(contents, dtype=torch.float32), torch.tensor(meant, dtype=torch.float32)))
    return contents == meant
