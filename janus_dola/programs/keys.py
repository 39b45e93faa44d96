"""The keys of each program, and what its --help says.

They are apart from the programs, whose imports take seconds: --help and an error in the arguments need no torch.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

from janus_dola.config import METHODS, DoLaConfig, option
from janus_dola.programs.generation import PAGE, refuse
from janus_dola.programs.options import DEFAULT, NO_MODEL, PROGRAMS, ROLES, ManyConfig, ModelConfig, read_yaml

BASELINE = "off"


@dataclass
class AnswerConfig(ManyConfig):
    """Asks a Janus model about images, with DoLa on or off: janus-dola [config=FILE] key=value ...

    One question:    janus-dola config=janus_pro_7b image=cat.png question="What is on the sofa?"
    Off against on:  janus-dola image=cat.png question="What is on the sofa?" compare=true trace=outputs
    Many questions:  janus-dola prompts=FILE.jsonl output=ANSWERS.jsonl compare=true report=REPORT.html
    """

    images: Any = option([], "paths or data URLs; image=PATH for a single one")
    image: str | None = option(None, "a single one of images")
    question: str | None = option(
        None,
        "<image_placeholder> marks where an image goes; without any, the images come first",
    )
    conversation: Any = option(None, "in place of question: turns with content, role and images, the user's first")
    compare: bool = option(False, "answer with DoLa off and on, with tokens and seconds per token of each")
    stream: bool = option(False, "print the answer as it is generated")
    trace: str | None = option(None, "a folder for trace.jsonl and trace.png: which layers were chosen, and their JSD")
    prompts: str | None = option(None, "JSON lines: question and images, or conversation; optionally id and DoLa keys")
    output: str | None = option(None, "JSON lines: id and text, tokens, layers, or id and error; as the answers come")
    report: str | None = option(None, "a page (.html) of all prompts and answers; with compare, of what DoLa changed")

    def __post_init__(self) -> None:
        super().__post_init__()
        images = self.images if self.image is None else self.image
        self.images = [images] if isinstance(images, str) else images or []
        if (self.prompts is None) != (self.output is None):
            raise ValueError(f"prompts and output must be given together, got {self.prompts!r} and {self.output!r}")
        if self.trace is not None and not find_spec("matplotlib"):
            raise ValueError("trace needs matplotlib: pip install 'janus-dola[viz]'")
        check_report(self.report)
        if self.report is not None and self.prompts is None:
            raise ValueError(f"report must come with prompts and output, got {self.report!r} alone")
        if self.engine != "transformers" and self.prompts is None:
            raise ValueError(f"engine must be transformers for one question, got {self.engine!r}")
        for key in ("question", "images", "conversation", "stream", "trace"):
            if self.prompts is not None and (value := getattr(self, key)):
                raise ValueError(f"prompts and {key} must not both be given, got {self.prompts!r} and {value!r}")


@dataclass
class CalibrateConfig(ManyConfig):
    """Chooses method, bucket and alpha on a validation set: janus-dola calibrate [config=FILE] data=FILE [output=FILE].

    Every question is answered with DoLa off and with each method and bucket, DoLa with each alpha; the best is written
    as a config, unless it is not distinguishable from DoLa off, which is then the winner.

        janus-dola calibrate config=janus_pro_7b data=val.jsonl alphas=[0.1,0.3] output=mine.yaml
    """

    data: str = option(
        "",
        'JSON lines in any of three forms: {"images", "question", "answer"}; {"images", "question", '
        '"choices", "answer": i}; POPE\'s {"question_id", "image", "text", "label"}, with "category" for '
        "figures by split; without images a question is text alone",
    )
    output: str | None = option(
        None,
        "the winner's configuration goes there, the table as JSON and the answers as they come beside it; "
        "null: outputs/calibrated.yaml",
    )
    methods: list[str] = option(
        list(METHODS),
        "the methods to try; DeCo and SLED have the strength and the k of their papers",
    )
    alphas: list[float] = option([0.1], "values of DoLa's alpha to try")
    strict: bool = option(False, "whether a bad line stops the run")
    two_fold: bool = option(
        False,
        "whether to choose on one half and report on the other as well, both ways, as the paper does",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data must name a file of JSON lines, got ''")
        if not self.alphas:
            raise ValueError("alphas must hold at least one value, got []")
        if not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, got []")
        self.configurations()  # checks the values
        if self.output is not None and not self.output.endswith((".yaml", ".yml")):
            raise ValueError(f"output must end in .yaml, got {self.output!r}")

    def configurations(self) -> dict[str, DoLaConfig]:
        """What is compared, by name; the baseline first."""
        named = {BASELINE: DoLaConfig(use_dola_lm=False)}
        for method, bucket_id in product(dict.fromkeys(self.methods), (0, 1, 2)):
            for alpha in self.alphas if method == "dola" else ():
                named[f"bucket {bucket_id}, alpha {alpha:g}"] = DoLaConfig(alpha=alpha, bucket_id=bucket_id)
            if method == "confident":  # which has layers of its own
                named[method] = DoLaConfig(method=method)
            elif method != "dola":
                named[f"{method}, bucket {bucket_id}"] = DoLaConfig(method=method, bucket_id=bucket_id)
        return named


@dataclass
class DrawConfig:
    """Draws images: janus-dola draw prompt=TEXT output=FOLDER [config=FILE] key=value ...

        janus-dola draw config=janus_pro_7b prompt="A red apple on a table" output=apples

    What `generation_inference.py`, the published script, does, with its defaults; DoLa is for text alone. From Python:
    `janus.image_generation`.
    """

    prompt: str = option("", "what to draw")
    output: str = option("generated_samples", "a folder for img_0.png, img_1.png, ...; those of that name are replaced")
    model_path: str = option("", "a folder, or a name on the hub, in the published layout")
    parallel_size: int = option(16, "number of images, which are drawn together")
    cfg_weight: float = option(5.0, "weight of the prompt in classifier-free guidance; 1: no guidance")
    temperature: float = option(1.0, "temperature of the sampling; 0: the likeliest token")
    seed: int = option(0, "the same seed draws the same images")
    device: str = option("auto", "auto: cuda, else mps, else cpu; or a PyTorch device, such as cuda:1")
    dtype: str = option("auto", "or float32, bfloat16, float16; auto as for `answer`")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise ValueError(NO_MODEL)
        if not self.prompt.strip():
            raise ValueError(f"prompt must not be empty, got {self.prompt!r}")
        if self.parallel_size < 1:
            raise ValueError(f"parallel_size must be at least 1, got {self.parallel_size}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        self.model()  # checks its own

    def model(self) -> ModelConfig:
        return ModelConfig(model_path=self.model_path, device=self.device, dtype=self.dtype, seed=self.seed)


@dataclass
class ExportConfig(DoLaConfig):
    """Writes a checkpoint as transformers' Janus, whose generate is DoLa: janus-dola export out=FOLDER key=value ...

    A model:      janus-dola export out=janus-pro-7b-dola config=janus_pro_7b alpha=0.1
    Its server:   transformers serve janus-pro-7b-dola --trust-remote-code
    DoLa alone:   janus-dola export out=dola
                  for any_model.generate(..., custom_generate="dola", trust_remote_code=True)
    """

    out: str = option("", "the folder to write; it must not exist")
    model_path: str = option(
        "",
        "a folder, or a name on the hub, in the published layout; without it DoLa is written alone",
    )
    roles: list[str] = option(ROLES, "how the checkpoint's prompts name user and assistant")
    generation: dict[str, Any] = option(lambda: read_yaml(DEFAULT)["generation"], "defaults of the folder's generate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out or os.path.lexists(self.out):
            raise ValueError(f"out must name a folder that does not exist yet, got {self.out!r}")


@dataclass
class ReportConfig:
    """A batch run as a page to look at: janus-dola report prompts=FILE.jsonl output=ANSWERS.jsonl report=REPORT.html

    It shows each prompt's pictures, question and answers; of a run with compare=true also the words in which the two
    answers differ, and what DoLa gained and lost where the prompts say what is right. It is one file and needs no
    network. A run with report=REPORT.html writes it at its end; this program writes it later, or of a run in progress.
    """

    prompts: str = option("", "the run's file of prompts")
    output: str = option("", "the run's answers")
    report: str = option("", "where to write the page (.html)")
    image_root: str = option(".", "folder of the images of lines in POPE's form")

    def __post_init__(self) -> None:
        for key in ("prompts", "output", "report"):
            if not getattr(self, key):
                raise ValueError(f"{key} must name a file, got {getattr(self, key)!r}")
        check_report(self.report)


@dataclass
class WebConfig(ModelConfig):
    """A page to ask a Janus model, with DoLa off and on side by side: janus-dola web [config=FILE] key=value ...

    The demo:          janus-dola web open=true
    A published model: janus-dola web config=janus_pro_7b

    use_dola_lm is not looked at; generation.max_new_tokens is also the most that one may ask for on the page.
    """

    host: str = option("127.0.0.1", "0.0.0.0: whoever reaches this machine may ask")
    port: int | None = option(None, "null: the first free one from 7860")
    open: bool = option(False, "open the page in this machine's browser")
    text_to_image: bool = option(
        False,
        "a tab that draws, where the checkpoint's image part is trained (the demo's is not)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self.generation, PAGE, "1 on a page")
        if not find_spec("gradio"):
            raise ValueError("web needs gradio: pip install 'janus-dola[web]'")


def check_report(path: str | None) -> None:
    """Refuses what is not the name of a page, such as the file of prompts, before it is overwritten."""
    if path is not None and not path.endswith(".html"):
        raise ValueError(f"report must end in .html, got {path!r}")


SCHEMAS: dict[str, type[Any]] = dict(
    zip(PROGRAMS, (AnswerConfig, CalibrateConfig, DrawConfig, ExportConfig, ReportConfig, WebConfig), strict=True)
)
