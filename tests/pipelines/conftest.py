"""Small checkpoints of every family in their real layouts, pictures to train on, and runs that are interrupted."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.pipelines.demo import shapes
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


class _Parts:
    """Random parts of a checkpoint, some thousands of weights each, and their tokenizers, which know real words."""

    def __init__(self, folder: Path):
        from equipoise.pipelines.demo.train_base import tokenizer

        torch.manual_seed(0)
        self.folder, self.clip_words = folder, tokenizer

    def clip(self, suffix: str = "", width: int = 16, layers: int = 1, projected: bool = False) -> dict:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        words = self.clip_words(self.folder / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=words.model_max_length,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            projection_dim=24,
        )
        made = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
        return {f"text_encoder{suffix}": made, f"tokenizer{suffix}": words}

    def t5(self, suffix: str) -> dict:
        from transformers import T5Config, T5EncoderModel, T5Tokenizer

        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
        words = T5Tokenizer(vocab=pieces + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)
        config = T5Config(
            vocab_size=len(words) + 2, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False
        )
        return {f"text_encoder{suffix}": T5EncoderModel(config), f"tokenizer{suffix}": words}

    def qwen(self) -> dict:
        from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

        clip = self.clip_words(self.folder.parent / "letters").get_vocab()
        letters = [piece for piece in clip if len(piece) == 1]
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        vocab = {piece: index for index, piece in enumerate([*letters, *special])}
        words = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:], chat_template=CHAT)
        config = Qwen3Config(
            vocab_size=len(words) + 2,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        return {"text_encoder": Qwen3Model(config), "tokenizer": words}

    def vae(self, **more):
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            sample_size=32,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            **more,
        )

    def unet(self, **more):
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, **more
        )


def _stable_diffusion(parts: _Parts, prediction_type: str = "epsilon"):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    words, vae = parts.clip(), parts.vae()
    unet = parts.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **words,
    )


def _stable_diffusion_xl(parts: _Parts):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words = parts.clip(layers=2) | parts.clip("_2", 32, layers=2, projected=True)
    vae = parts.vae(scaling_factor=0.13025)
    unet = parts.unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **words)


def _stable_diffusion_3(parts: _Parts, t5: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    words = parts.clip(layers=2, projected=True) | parts.clip("_2", layers=2, projected=True)
    words |= parts.t5("_3") if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    vae = parts.vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=48,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(vae=vae, transformer=transformer, scheduler=scheduler, **words)


def _flux(parts: _Parts, guidance_embeds: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words = parts.clip() | parts.t5("_2")
    vae = parts.vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **words)


def _z_image(parts: _Parts):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    words = parts.qwen()
    vae = parts.vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 64, 64],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # made without values
        torch.nn.init.normal_(getattr(transformer, name), std=0.02)
    return ZImagePipeline(
        vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **words
    )


BUILDERS = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "ZImagePipeline": _z_image,
}


@pytest.fixture(scope="session")
def build_checkpoint(tmp_path_factory):
    """Makes a small checkpoint of a family, in the layout that diffusers saves: once for the same words."""
    made: dict[str, Path] = {}

    def build(name: str = "StableDiffusionPipeline", **options) -> Path:
        key = f"{name}{options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
            BUILDERS[name](_Parts(folder), **options).save_pretrained(folder, safe_serialization=True)
            made[key] = folder
        return made[key]

    return build


@pytest.fixture(scope="session")
def checkpoint(build_checkpoint) -> Path:
    return build_checkpoint()


@pytest.fixture(scope="session")
def xl_checkpoint(build_checkpoint) -> Path:
    return build_checkpoint("StableDiffusionXLPipeline")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four captioned pictures of different sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index, background in enumerate(shapes.BACKGROUNDS):
        picture = shapes.draw_varied(shapes.OBJECT, background, rng)
        picture.resize((48 + 16 * index, 64), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a sks object on a {background} background"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def short(checkpoint, pictures, tmp_path) -> list[str]:
    """Overrides that make any text-to-image configuration a run of seconds."""
    return [
        f"model={checkpoint}",
        f"data={pictures}",
        "data.resolution=32",
        "data.instance_prompt=null",
        "steps=6",
        "batch=2",
        "samples.steps=2",
        "samples.count=1",
        f"runs={tmp_path / 'runs'}",
    ]


@pytest.fixture
def place(distribution, tmp_path, monkeypatch) -> Path:
    """A working folder with a configuration of the pipeline that counts, a data folder and nothing else."""
    source = Path(__file__).with_name("counting.py").read_text()
    distribution("counting", {"equipoise.pipelines": {"counting": "counting:Counting"}}, counting=source)
    folder = tmp_path / "work"
    (folder / "pictures").mkdir(parents=True)
    (folder / "vase.yaml").write_text("pipeline: counting\nname: vase\ndata: pictures\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    return folder


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload takes: a repository, what goes how, large files, a commit."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_GET = do_POST

    def answer(self, body: bytes) -> None:
        server: HubServer = self.server
        server.asked.append((self.command, self.path.split("?")[0], self.headers.get("Authorization"), body))
        here = f"http://127.0.0.1:{server.server_port}"
        if server.refuses:
            return self.reply({"error": f"no rights for {server.secret}"}, 403)
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{here}/somebody/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            return self.reply(
                {"files": [{"path": n, "uploadMode": modes[n.endswith("s")], "shouldIgnore": False} for n in names]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = [(one["oid"], one["size"]) for one in json.loads(body)["objects"]]
            up = [{"oid": o, "size": s, "actions": {"upload": {"href": f"{here}/put/{o}"}}} for o, s in wanted]
            return self.reply({"transfer": "basic", "objects": up}, kind="application/vnd.git-lfs+json")
        if self.path.startswith("/put/"):
            server.large[self.path.rsplit("/")[-1]] = body
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
            return self.reply({"commitUrl": f"{here}/somebody/vase/commit/1", "commitOid": "1", "success": True})
        return self.reply({})

    def reply(self, document: dict, code: int = 200, kind: str = "application/json") -> None:
        data = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class HubServer(ThreadingHTTPServer):
    """Takes uploads as the Hugging Face hub does, and keeps them."""

    daemon_threads = True
    secret = "hf_thisIsTheSecretOfThisTest"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.asked: list[tuple[str, str, str | None, bytes]] = []
        self.large: dict[str, bytes] = {}  # by their SHA-256
        self.files: dict[str, bytes] = {}  # of the repository
        self.refuses = False

    def push(self, run: Path, *words: str) -> subprocess.CompletedProcess:
        """Exports a run to it, by the command line in a process of its own."""
        environment = os.environ | {
            "HF_TOKEN": self.secret,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_DISABLE_XET": "1",  # the hub's older protocol, which is plain HTTP
            "HF_HOME": str(run.parent / "hub"),
        }
        command = [sys.executable, "-m", "equipoise.pipelines.cli", "export", str(run), "--push-to-hub", "vase", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def hub():
    """A hub that takes what is pushed to it."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def stopped_run():
    """Starts a run that is asked to stop at a step, and gives it stopped."""

    def stopped(pipeline, settings, at: int) -> Run:
        run = Store(settings.runs).create(settings)
        metric = type(run).metric

        def then_stop(self, step, **values):
            metric(self, step, **values)
            if step == at:
                self.request("stop")

        run.metric = then_stop.__get__(run)
        assert execute(pipeline, settings, run).state == "stopped"
        del run.metric
        return run

    return stopped


@pytest.fixture(scope="session")
def trainers(tmp_path_factory, forked_type):
    """Starts the command line in processes that need not import what a training imports, which takes most of a short
    one's time; as many threads as here compute in each."""
    modules = [f"equipoise.pipelines.{name}.train" for name in ("text_to_image", "instruction_tuning", "audio_visual")]
    threads = str(torch.get_num_threads())
    forked = forked_type(tmp_path_factory.mktemp("trainers"), *modules, OMP_NUM_THREADS=threads)
    yield forked
    forked.end()


@pytest.fixture
def killed_run(tmp_path, trainers):
    """Trains by the command line, kills that (SIGKILL) once a checkpoint is there, resumes it, and gives the run."""

    def killed(name: str, words: list[str], checkpoint: str, last: str) -> Run:
        command = ["-m", "equipoise.pipelines.cli"]
        process = trainers.start(Path.cwd(), *command, "train", name, *words, "--id", "killed", **os.environ)
        run = tmp_path / "runs" / "killed"
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / checkpoint).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process().returncode == -signal.SIGKILL
        store = Store(tmp_path / "runs")
        assert store.get("killed").status().state == "dead"
        assert checkpoints.complete(run / "checkpoints")[-1].name < last
        resumed = trainers(Path.cwd(), *command, "resume", str(run), **os.environ)
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed from step-0000" in (run / "log.txt").read_text()
        return store.get("killed")

    return killed


@pytest.fixture
def launch():
    """Starts the command line by torchrun, in two processes that train together, which do not outlive the test."""
    begun: list[subprocess.Popen] = []

    def started(*words: str, **options) -> subprocess.Popen:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command += ["-m", "equipoise.pipelines.cli", *words]
        begun.append(subprocess.Popen(command, env=environment, **pipes, **options))
        return begun[-1]

    yield started
    for process in begun:
        process.terminate()  # torchrun then ends its own
        process.communicate()


@pytest.fixture
def launched(trainers):
    """Runs the command line in two processes, as torchrun starts them, to its end; gives what they print."""

    def done(*words: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        shared |= {"GLOO_SOCKET_IFNAME": "lo"}
        command = ["-m", "equipoise.pipelines.cli", *words]
        both = [
            trainers.start(Path.cwd(), *command, **{**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
        ]
        ended = [started() for started in both]
        assert [one.returncode for one in ended] == [0, 0], "".join(one.stderr[-3000:] for one in ended)
        return "".join(one.stdout for one in ended)

    return done


@pytest.fixture
def command():
    """Starts the command line in a process of its own, which does not outlive the test."""
    begun: list[subprocess.Popen] = []

    def started(*words: str, **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen([sys.executable, "-m", "equipoise.pipelines.cli", *words], **pipes, **options))
        return begun[-1]

    yield started
    for process in begun:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture
def until():
    """Waits until something is so."""

    def waited(condition, what: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds  # for machines that are busy with other things
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen in {seconds:g} s"
            time.sleep(0.05)

    return waited
