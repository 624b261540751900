#!/usr/bin/env python3
"""Makes a model deeper without changing what it says: `deepen.py MODEL.gguf OUT.gguf TIMES` writes one with TIMES as many layers,
of which the further ones add nothing to the hidden state, since their output matrices are zero. It computes as much as a
model that is so much larger, and the first one is a draft model for it that is right as often as its quantization lets it: a
pair to measure drafts with where no two models of a family are at hand. Needs the package `gguf`.
"""
import sys

import gguf
import numpy as np

# What a layer adds to the hidden state is the product of these.
OUTPUTS = ("attn_output", "ffn_down")


def main(source, target, times):
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    layers = reader.fields[f"{architecture}.block_count"].contents()
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = layers * times if field.name == f"{architecture}.block_count" else field.contents()
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for more in range(1, times):
        for tensor in reader.tensors:
            if not tensor.name.startswith("blk."):
                continue
            _, layer, name = tensor.name.split(".", 2)
            data = np.zeros_like(tensor.data) if name.startswith(OUTPUTS) else tensor.data
            writer.add_tensor(f"blk.{int(layer) + more * layers}.{name}", data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
