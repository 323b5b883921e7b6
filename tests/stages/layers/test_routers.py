"""Mixtures of experts: what chooses the experts computes in fp32, and a choice that rounding flips is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from accelerate_tts import optimized_model, receipt_of
from accelerate_tts.inspection.routers import routers
from accelerate_tts.plan import Part
from accelerate_tts.stages.catalogue import default_stages
from doubles import pays_off

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": None,
}  # fmt: skip
SOME, FEW = {"num_local_experts": 64, "num_experts_per_tok": 2}, {"moe_intermediate_size": 32}
# Enough experts that the stages for large layers take the router, too. In transformers 5 most have a class of their
# own with a bare parameter; before, most were linear layers.
MIXTURES: dict[str, tuple[str | tuple[str, ...], dict[str, Any]]] = {
    "Mixtral": (".gate", SOME),
    "Qwen2Moe": ("mlp.gate", {"num_experts": 64, "shared_expert_intermediate_size": 64, **FEW}),
    "Olmoe": ("mlp.gate", {"num_experts": 64, "num_experts_per_tok": 2}),
    "Phimoe": (("mlp.router", "block_sparse_moe.gate"), SOME),
    "Llama4Text": ("feed_forward.router", {**SOME, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64}),
    "HunYuanMoEV1": ("mlp.gate.wg", {"num_experts": 64, "moe_topk": 2}),
    "Jamba": ("feed_forward.router", {"num_experts": 64, "use_mamba_kernels": False, "expert_layer_period": 1,
                                      "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0}),
    "JetMoe": ("mlp.router.layer", {**SOME, "kv_channels": 32}),
    "Doge": ("mlp.router_gate", {"is_moe": True, "num_experts": 32 * 32, "num_experts_per_tok": 4}),
    "SwitchTransformers": ("router.classifier", {}),
}  # fmt: skip


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    if name.startswith("Switch"):
        module = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
        config: Any = transformers.SwitchTransformersConfig(
            vocab_size=32, d_model=256, d_ff=64, d_kv=64, num_layers=2, num_heads=4, num_experts=64
        )
        return module.SwitchTransformersSparseMLP(config).eval()
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MIXTURES[name][1], **options})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def stages() -> list[Any]:
    found = {
        stage.name: stage for precision in ("balanced", "fast") for stage in default_stages("cpu", "default", precision)
    }
    return [stage for name, stage in found.items() if ("bf16" in name or "int8" in name) and "fused" not in name]


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_known_and_compute_in_fp32(name: str) -> None:
    model, ends = build(name), MIXTURES[name][0]
    found = [(at, module) for at, module in model.named_modules() if f".{at}".endswith(ends)]
    assert found
    assert {module for _, module in found} <= routers(model)
    part = Part("part", "decoder", model, few_rows=1.0)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    applied = 0
    with torch.inference_mode():
        expected = {at: module(x) for at, module in found}
        for stage in stages():
            if stage.applies(part) is not None:
                continue
            applied += 1
            change = stage.prepare(part)
            change.on()
            for at, module in found:
                now, before = module(x), expected[at]
                for one, other in zip(
                    *(each if isinstance(each, tuple) else (each,) for each in (now, before)), strict=True
                ):
                    assert torch.equal(one, other), f"{at} under {stage.name}"
            change.off()
    assert applied


def test_what_only_has_the_name_is_none() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    class SpeechRouter(nn.Module):
        """A service's own: languages by model."""

        def __init__(self) -> None:
            super().__init__()
            self.english, self.german = Mlp(), Mlp()

    class Service(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.vocoder = SpeechRouter(), nn.Linear(8, 8)

    assert not routers(Service())
    mixture = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": nn.ModuleList([Mlp(), Mlp()]), "shared_expert": Mlp(),
                             "shared_expert_gate": nn.Linear(8, 1)})  # fmt: skip
    assert routers(mixture) == {mixture["gate"]}
    assert not routers(nn.ModuleList([None, nn.Linear(8, 8)]))  # type: ignore[list-item] # torch allows it


@pytest.mark.parametrize("kind", ["bf16 layers", "int8 linear layers"])
def test_an_ordinary_load_refuses_what_flips_experts(kind: str, decide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each token of the warm-up two experts are equally good, to less than a rounding of what they are given."""
    monkeypatch.setenv("ACCELERATE_TTS_TORCH_COMPILE", "0")
    decide(
        compare=pays_off,
        looks=False,
        unworthy=lambda _baseline, _part, stage: None if stage.name.startswith(kind) else "not in this test",
    )
    model = build("Mixtral", num_local_experts=2, num_experts_per_tok=1)
    x = torch.randn(1, 32, 256, generator=torch.Generator().manual_seed(1))

    def work(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(inputs_embeds=x).last_hidden_state
        return found

    router = next(
        module
        for name, module in model.named_modules()
        if name.endswith(("layers.1.mlp.gate", "layers.1.block_sparse_moe.gate"))
    )
    given: list[torch.Tensor] = []
    hook = router.register_forward_pre_hook(lambda _module, args: given.append(args[0].reshape(32, 256).double()))
    with torch.no_grad():
        work(model)
        hook.remove()
        across = torch.linalg.svd(given[0])[2][-1]  # no token has anything in this direction
        router.weight[1] = router.weight[0] + across
        expected = work(model)
    optimized_model(precision="fast", warmup=work, tune_seconds=60)(lambda: model)()
    receipt = receipt_of(model)
    assert receipt is not None
    tried = [result for result in receipt.stages if result.stage.startswith(kind)]
    assert tried
    assert all(not result.kept and result.reason.startswith("error ") for result in tried), str(receipt)
    with torch.inference_mode():
        assert torch.equal(work(model), expected)
