"""What other libraries do to a model: moved, quantized, adapted, tied, copied, pickled, saved, compiled.

Whatever has been done, the exits are what that very model's norm and head make of its hidden states.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import ALPHA, GREEDY, IDS, LAYERS, MASK, TEXT, Case, N, all_logits, one_thread, unchanged
from oracle import Recorder, assert_scores, oracle_scores
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.exits import ExitView, generating_model

__all__ = ["one_thread"]  # a fixture, for this module as well
CONFIG = DoLaConfig(candidate_layers=LAYERS, alpha=ALPHA)


def small_model(**values: Any) -> Any:
    """Always the same one. Sizes are multiples of 32, or 64, that quantized products ask for."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT | {"hidden_size": 64, "intermediate_size": 128} | values)).eval()


def answer(model: Any, **more: Any) -> Any:
    details = {"return_dict_in_generate": True, "output_scores": True}
    return DoLaJanusWrapper(model, CONFIG).generate(input_ids=IDS, attention_mask=MASK, **(GREEDY | details | more))


def assert_answers_step_by_step(model: Any) -> None:
    """By an oracle with a cache: where activations are rounded to int8, those of a whole prompt round otherwise."""
    norm, head, output, past = model.model.norm, model.lm_head, answer(model), None
    for t, got in enumerate(output.scores):
        tokens = output.sequences[:, : IDS.shape[1] + t]
        mask = torch.cat([MASK, torch.ones(2, t, dtype=torch.long)], 1)
        new = slice(None) if past is None else slice(-1, None)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, new]
        inputs = {"input_ids": tokens[:, new], "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            plain = model(**inputs, past_key_values=past, use_cache=True, output_hidden_states=True)
            past, exits = plain.past_key_values, [head(norm(plain.hidden_states[j][:, -1:])) for j in LAYERS]
        each = torch.cat([*exits, plain.logits[:, -1:]], 1).double().numpy()
        assert_scores(got, oracle_scores(each, each[:, -1], [1, 2, 3, 4], ALPHA))


def assert_scored_as_answered(model: Any, output: Any) -> None:
    """What `score` says of the answer is what generate said."""
    answered = output.sequences[:, IDS.shape[1] :]
    got = DoLaJanusWrapper(model, CONFIG).score(input_ids=IDS, attention_mask=MASK, continuation_ids=answered)
    want = torch.stack(output.scores, 1).gather(2, answered[..., None])[..., 0]  # [rows, T]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def assert_same_answer(got: Any, want: Any, atol: float = 0.0) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.scores, want.scores, strict=True):
        assert torch.equal(a, b) if atol == 0 else torch.allclose(a, b, atol=atol)


def assert_exits(model: Any, exact: bool = False) -> None:
    """The exits are separate calls of the head, and the model's own logits are what they were.

    Args:
        model: Any that the wrapper takes.
        exact: Whether the head is called as it is, so that all is bit for bit what one call on all of it gives. An
            nn.Linear with nothing to it is multiplied the other way round.
    """
    generating = generating_model(model)
    norm, head = generating.get_decoder().norm, generating.get_output_embeddings()
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        logits = ExitView(generating, LAYERS).model(**inputs).logits
        plain = generating(**inputs, output_hidden_states=True)
        exits = [plain.hidden_states[j][:, -1:] for j in LAYERS]
        want = torch.cat([head(norm(h)) for h in exits], 1)
        joint = head(torch.cat([norm(torch.cat(exits, 1)), plain.hidden_states[N]], 1))
    torch.testing.assert_close(logits[:, : len(LAYERS)], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, len(LAYERS) :], plain.logits, atol=1e-5, rtol=1e-5)
    if exact:
        assert torch.equal(logits, joint)
    assert (want[:, 1:] - want[:, :-1]).abs().amax(-1).min() > 0.1  # the layers differ


def assert_exits_and_answers(model: Any, exact: bool = False) -> Any:
    """The exits are right, and each step of generate is the oracle's. Returns the greedy answer."""
    assert_exits(model, exact)
    given = Case(generating_model(model), {"input_ids": IDS}, unchanged)
    for num_beams in (2, 1):
        recorder = Recorder()
        output = answer(model, num_beams=num_beams, logits_processor=[recorder])
        assert len(output.scores) == len(recorder.input_ids) == 5
        for tokens, got in zip(recorder.input_ids, output.scores, strict=True):
            each = all_logits(given, tokens)
            assert_scores(got, oracle_scores(each, each[:, -1], LAYERS, ALPHA))
    chosen = torch.stack([scores.argmax(-1) for scores in output.scores], 1)
    assert torch.equal(output.sequences, torch.cat([IDS, chosen], 1))
    assert_scored_as_answered(model, output)
    return output


# What is kept elsewhere comes to the CPU for its forward pass.
ELSEWHERE = ["model.layers.1", "model.layers.3", "model.layers.7", "model.norm", "lm_head"]


def device_map(elsewhere: list[str]) -> dict[str, str]:
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(N)]
    return {part: "disk" if part in elsewhere else "cpu" for part in parts}


@pytest.mark.parametrize("elsewhere", [ELSEWHERE, ["lm_head"], ["model.norm"], ["model.layers.3"]], ids=str)
def test_dispatched_by_accelerate(elsewhere: list[str], tmp_path: Path) -> None:
    """Its hooks replace the `forward` of modules, the top one's too, by functions bound to the originals."""
    from accelerate import dispatch_model

    want = answer(small_model())
    model = dispatch_model(small_model(), device_map(elsewhere), main_device="cpu", offload_dir=tmp_path)
    assert model._hf_hook.io_same_device
    assert ("lm_head" in elsewhere) == (model.lm_head.weight.device.type == "meta")
    assert_same_answer(assert_exits_and_answers(model, exact="lm_head" in elsewhere), want, atol=1e-5)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_whole_by_accelerate(where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    want, model = answer(small_model()), small_model()
    cpu = torch.device("cpu")
    model = cpu_offload(model, cpu) if where == "cpu" else disk_offload(model, tmp_path, cpu)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_same_answer(assert_exits_and_answers(model, exact=True), want, atol=1e-5)


def test_hooks_of_accelerate_act_on_the_exits() -> None:
    """They stand for those that bring tensors from one GPU to the next: on all that is on the way, before and after."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            seen.append(module)
            return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    class Seen(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    seen: list[nn.Module] = []
    model = small_model()
    for module in (model, model.model):
        add_hook_to_module(module, Seen())
    for module in (model.model.layers[3], model.model.norm, model.lm_head):
        add_hook_to_module(module, Double())
    plain = answer(small_model())
    assert not torch.allclose(assert_exits_and_answers(model).scores[0], plain.scores[0])
    seen.clear()
    answer(model)
    names = {"LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer", "LlamaRMSNorm", "Linear"}
    assert {type(module).__name__ for module in seen} == names
    assert len(seen) == 5 * 5  # steps, modules: each once


def test_loaded_in_parts(tmp_path: Path) -> None:
    want = answer(small_model())
    small_model().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map(ELSEWHERE), offload_folder=tmp_path / "offload"
    ).eval()
    assert model.lm_head.weight.device.type == "meta"
    assert model.hf_device_map["model.layers.3"] == "disk"
    assert_same_answer(assert_exits_and_answers(model, exact=True), want, atol=1e-5)


@pytest.mark.parametrize("part", ["model", "head"])
def test_quantized_by_torchao(part: str) -> None:
    """A head that is an nn.Linear with a weight that is no plain tensor.

    Not among the packages for tests: 0.16 to 0.18 print lines of their own whenever transformers is imported.
    """
    quantization = pytest.importorskip("torchao.quantization")
    model = small_model()
    chosen = None if part == "model" else lambda module, name: name == "lm_head"
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
    assert type(model.lm_head) is nn.Linear and type(model.lm_head.weight) is not nn.Parameter
    assert_exits_and_answers(model, exact=True)


@pytest.mark.parametrize("part", ["model", "head"])
def test_quantized_by_quanto(part: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = small_model()
    quanto.quantize(model, weights=quanto.qint8, include=None if part == "model" else "lm_head")
    quanto.freeze(model)
    assert isinstance(model.lm_head, quanto.QLinear)
    assert_exits_and_answers(model, exact=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_by_bitsandbytes(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = small_model()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            sizes = module.in_features, module.out_features
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            new.load_state_dict({"weight": module.weight.data})
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.eval()
    assert model.lm_head.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert_exits_and_answers(model, exact=True)


TARGETS = ["q_proj", "down_proj", "lm_head"]


def adapted(model: Any, how: str) -> Any:
    """With LoRA of non-zero B, which `init_lora_weights=False` gives."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, lora).eval() if how == "wrapped" else peft.inject_adapter_in_model(lora, model)


@pytest.mark.parametrize("how", ["injected", "wrapped"])
def test_adapted_by_peft(how: str) -> None:
    plain = answer(small_model())
    model = adapted(small_model(), how)
    got = assert_exits_and_answers(model, exact=True)
    assert not torch.allclose(got.scores[0], plain.scores[0])
    if how == "wrapped":
        with model.disable_adapter():
            assert_same_answer(answer(model), plain, atol=1e-5)
        assert_same_answer(answer(model), got)
        merged = answer(model.merge_and_unload())
        assert torch.equal(merged.sequences, got.sequences)
        assert_scores(merged.scores[0], got.scores[0].double().numpy())


@pytest.mark.parametrize("embedding", ["LoRA", "trainable tokens", "saved whole"])
def test_adapted_embedding_and_head(embedding: str) -> None:
    """Modules of peft's in the places of the embedding and the head."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets: dict[str, Any] = {
        "LoRA": {"target_modules": ["q_proj", "embed_tokens"]},
        "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [6, 7]},
        "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    }
    model = peft.get_peft_model(small_model(), peft.LoraConfig(r=4, init_lora_weights=False, **targets[embedding]))
    own = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name or "modules_to_save" in name]
    with torch.no_grad():
        for parameter in own:  # it starts as a copy of what it stands for
            parameter.mul_(1.5)
    assert bool(own) == (embedding != "LoRA")
    got = assert_exits_and_answers(model.eval())
    language_model = generating_model(model)
    with torch.no_grad():
        embeds = language_model.get_input_embeddings()(IDS)
    wrapper = DoLaJanusWrapper(model, CONFIG)
    from_embeds = wrapper.generate(inputs_embeds=embeds, attention_mask=MASK, **GREEDY)
    assert torch.equal(from_embeds, got.sequences[:, IDS.shape[1] :])


@pytest.mark.parametrize("adapter", [False, True])
def test_tied_head(adapter: bool) -> None:
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if adapter:
        model = adapted(model, "injected")
    wrapper = DoLaJanusWrapper(model, CONFIG)
    assert wrapper.phi is model.lm_head
    got = assert_exits_and_answers(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)  # the head's as well
    assert not torch.allclose(assert_exits_and_answers(model).scores[0], got.scores[0])


def saved_and_loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "again",
    [
        lambda model, folder: copy.deepcopy(model),
        lambda model, folder: pickle.loads(pickle.dumps(model)),
        saved_and_loaded,
        lambda model, folder: copy.deepcopy(DoLaJanusWrapper(model, CONFIG)).model,
        lambda model, folder: pickle.loads(pickle.dumps(DoLaJanusWrapper(model, CONFIG))).model,
    ],
    ids=["deepcopy", "pickle", "save_pretrained", "deepcopy of the wrapper", "pickle of the wrapper"],
)
def test_a_model_is_copied_after_calls(again: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """Nothing that a call has made goes along, and the copy answers for itself, not for the original."""
    model = small_model()
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    want = answer(model)
    assert len(pickle.dumps(model)) == size
    other = again(model, tmp_path)
    assert list(other.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert_same_answer(answer(other), want)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    assert_same_answer(answer(other), want)
    assert not torch.equal(answer(model).scores[0], want.scores[0])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda wrapper: pickle.loads(pickle.dumps(wrapper))])
def test_a_wrapper_is_copied_with_its_config(again: Callable[[Any], Any]) -> None:
    wrapper = DoLaJanusWrapper(small_model(), DoLaConfig(alpha=0.3, candidate_layers=[2, 6]))
    arguments = {"input_ids": IDS, "attention_mask": MASK, **GREEDY}
    want = wrapper.generate(**arguments)
    other = again(wrapper)
    assert other.config == wrapper.config and other.config is not wrapper.config
    assert other.model is not wrapper.model
    assert torch.equal(other.generate(**arguments), want)
    other.config.use_dola_lm = False
    assert torch.equal(other.generate(**arguments), wrapper.model.generate(**arguments))
    assert torch.equal(wrapper.generate(**arguments), want)


def in_place(model: Any, path: str) -> Any:
    model.get_submodule(path).compile(backend="eager")
    return model


def by_forward(model: Any, path: str) -> Any:
    module = model.get_submodule(path)
    module.forward = torch.compile(module.forward, backend="eager")
    return model


def in_its_place(model: Any, path: str) -> Any:
    """A module of torch.compile's, which holds the original, is put where that was."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(path), backend="eager"))
    return model


def as_a_whole(model: Any, path: str) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("compiled", "path"),
    [
        (as_a_whole, ""),
        (by_forward, ""),
        (in_place, ""),
        (by_forward, "model"),
        (in_place, "model.layers.3"),  # layer 4, which is tapped
        (by_forward, "model.layers.3"),
        (in_place, "model.layers.2"),  # layer 3, which is not
        (in_place, "lm_head"),
        (in_its_place, "model"),
        (in_its_place, "model.layers.3"),
        (in_its_place, "lm_head"),
    ],
)
def test_compiled_by_the_user(compiled: Callable[[Any, str], Any], path: str) -> None:
    """What is compiled is bound to the user's modules: taken as it is, it would run without the taps."""
    torch._dynamo.reset()  # it gives up on a function after some recompilations, of other tests too
    want = answer(small_model(), max_new_tokens=2)
    model = compiled(small_model(), path)
    for _ in range(2):
        assert_same_answer(answer(model, max_new_tokens=2), want, atol=1e-5)
    assert_scored_as_answered(model, want)


@pytest.mark.parametrize("path", ["", "model"])
def test_a_forward_that_is_no_method_is_refused(path: str) -> None:
    """It closes over the model, not over the view: the exits would be missing, or another call's."""
    model = small_model()
    module = model.get_submodule(path)
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match=f"model must run by its .* got {type(module).__name__} with another"):
        answer(model)
    del module.forward
    assert_exits_and_answers(model)


def test_a_learned_prompt_is_refused() -> None:
    """peft puts it ahead in its own generate, which DoLa would go round without a word."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="must take its prompt as it is, got PeftModelForCausalLM"):
        DoLaJanusWrapper(peft.get_peft_model(small_model(), config))


def test_a_whole_janus_is_trained_with_lora_merged_saved_and_asked(tmp_path: Path) -> None:
    """As the recipes for Janus do it: peft asks for what a CAUSAL_LM has, and the labels are set on the batch."""
    peft = pytest.importorskip("peft")
    from conftest import CHECKPOINT, GOLDEN

    from janus.models import MultiModalityCausalLM, VLChatProcessor
    from janus.utils.io import load_pil_images

    vl_gpt = MultiModalityCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    targets = r"language_model\..*\.(q_proj|v_proj|down_proj)"
    model = peft.get_peft_model(vl_gpt, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
    processor = VLChatProcessor.from_pretrained(CHECKPOINT)
    image = str(GOLDEN / "expected" / "images" / "wide.png")
    turns = [
        {"role": "<|User|>", "content": "<image_placeholder>\nWhat is it?", "images": [image]},
        {"role": "<|Assistant|>", "content": "It is a ring."},
    ]
    batch = processor(conversations=turns, images=load_pil_images(turns))
    batch["labels"] = batch.input_ids.masked_fill(batch.images_seq_mask, -100)

    def loss(input_ids: Any, attention_mask: Any, labels: Any, **images: Any) -> Any:
        embeds = vl_gpt.prepare_inputs_embeds(input_ids=input_ids, **images)
        return vl_gpt.language_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels).loss

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(8):
        losses.append(loss(**batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]

    model.merge_and_unload().save_pretrained(tmp_path)
    again = MultiModalityCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    asked = processor(conversations=[turns[0], {"role": "<|Assistant|>", "content": ""}], images=load_pil_images(turns))
    answers = []
    for asked_model in (vl_gpt.eval(), again):
        with torch.no_grad():
            prompt = {
                "inputs_embeds": asked_model.prepare_inputs_embeds(**asked),
                "attention_mask": asked.attention_mask,
            }
            answers.append(DoLaJanusWrapper(asked_model, CONFIG).generate(**prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(*answers)
