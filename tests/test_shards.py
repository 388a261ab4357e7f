"""A shard rank reads and holds its own part of the base, wherever the bytes of a tensor lie."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gang import Ranks, together
from test_context import PLAIN

from mochi_lora.engine.shards import ShardedBlocks
from mochi_lora.engine.transfer import bytes_of, laid_out, room_for
from mochi_lora.model.tiny import TRANSFORMER
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer
from mochi_lora.planning.footprint import resident_bytes
from mochi_lora.planning.workload import ModelSize
from mochi_lora.runs.models import load_planned

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_bytes_of_a_tensor_give_it_back_whatever_its_order(dtype):
    plain = torch.arange(24).reshape(4, 6)[1:].to(dtype)
    for tensor in (plain, plain.t(), plain[0], plain[0, 0]):
        memory = torch.zeros(256 + room_for(tensor), dtype=torch.uint8)
        taken = bytes_of(tensor)
        memory[256 : 256 + taken.numel()] = taken
        back = laid_out(memory, 256, tensor)
        assert back.stride() == tensor.stride()
        assert torch.equal(back.float(), tensor.float())


def resident(ranks: Ranks, folder: Path) -> tuple[float, int]:
    """Of the weights file the share that has been read into this process by the time its model stands; bytes of the base."""
    plan = replace(PLAIN, precision="bf16", shard=ranks.layout.shard)
    model = VelocityModel(load_planned(folder, plan, CPU).transformer, plan, ranks)
    (file,) = folder.glob("*.safetensors")
    kilobytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            kilobytes += int(line.split()[1])
    assert model.transformer.proj_out.weight.sum(), "what is outside of the blocks keeps the file mapped until here"
    split = model._blocks.swap
    assert isinstance(split, ShardedBlocks)
    gone = {id(weight.tensor) for weights in split._weights for weight in weights}
    stays = sum(tensor.nbytes for tensor in model.parameters() if id(tensor) not in gone)
    held = sum(memory.numel() for memory in (*split._parts, *split._slots))
    return kilobytes * 1024 / file.stat().st_size, stays + held


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts pages by /proc")
def test_a_rank_reads_its_own_part_of_the_file_and_holds_what_is_predicted(tmp_path):
    wide = TRANSFORMER | {"num_layers": 4, "num_attention_heads": 24, "pooled_projection_dim": 384}
    random_transformer(wide, device=CPU, precision="bf16").save_pretrained(tmp_path)
    predicted = resident_bytes(ModelSize.of(wide), replace(PLAIN, precision="bf16", shard=2))
    for share, held in together(2, resident, tmp_path, parallel="shard:2"):
        assert 0.4 < share < 0.65
        assert held == pytest.approx(predicted, rel=0.01)
