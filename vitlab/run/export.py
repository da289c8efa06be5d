"""`vitlab export`: a checkpoint as ONNX or for torch.export, held against torch, and timed beside it."""

import importlib.util
import logging

import torch

from vitlab.metrics import meters
from vitlab.models import checkpoint
from vitlab.run.runner import columns
from vitlab.utils.device import example, running

CLOSE = 1e-4  # largest difference of a logit from torch's
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def exported(model, images):
    """The model (eval mode) as torch.export's program for any batch; images: B C H W to trace it with, B > 1."""
    with torch.no_grad():  # strict: else attention fixes the batch to the one it is traced with
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=True)


def to_onnx(model, path, images):
    """Write the model as ONNX for any batch, input "images", output "logits"."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)} (or 'vitlab[dev]')")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it wonders about empty lists of axes, which are right
    torch.onnx.export(exported(model, images), (images,), path, input_names=["images"], output_names=["logits"],
                      dynamo=True, external_data=False, verbose=False)  # fmt: skip


def onnx_session(path, threads=None):
    """A function of images B C H W that runs the ONNX file on the CPU in onnxruntime -> logits B K."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_pt2(model, path, images):
    """Write the model for torch.export.load, for any batch."""
    torch.export.save(exported(model, images), path)


def difference(model, other, shape, batches):
    """The largest difference of a logit between two functions of images, at all these batches."""
    worst = 0.0
    with running([model], "cpu"):
        for batch in batches:
            images = example(model, shape, batch)
            worst = max(worst, (model(images) - other(images)).abs().max().item())
    return worst


def timings(runs, shape, batches, seconds):
    """{batch: {name: ms}} of functions of images, in turns; a run that fails at first is left out with a word."""
    found = {}
    for batch in batches:
        images = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0))
        for name in list(runs):
            try:
                with running([runs[name]], "cpu"):
                    runs[name](images)
            except Exception as problem:  # no C++ compiler, an operation that cannot be compiled
                print(f"{name}: not measured ({str(problem).splitlines()[0][:120]})", flush=True)
                del runs[name]
        timed = meters.compare(runs, images, warmup=2, seconds=seconds, min_runs=5)
        found[batch] = {name: 1e3 * timing.median_s for name, timing in timed.items()}
    return found


def export(options):
    """Write the files asked for; a difference above CLOSE is an error (exit code 1)."""
    if not options.onnx and not options.pt2:
        raise ValueError("nothing to do: give --onnx, --pt2, or both")
    model = checkpoint.load(options.checkpoint)
    shape = model.config.in_chans, model.config.image_size, model.config.image_size
    images, folder, code = example(model, shape, 2), options.out or options.checkpoint.parent, 0
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"torch, eager": model}
    for kind, asked, write in (("onnx", options.onnx, to_onnx), ("pt2", options.pt2, to_pt2)):
        if not asked:
            continue
        path = folder / f"{options.checkpoint.stem}.{kind}"
        print(f"writing {path}", flush=True)
        try:
            write(model, path, images)
        except Exception as problem:  # whatever torch.export cannot trace
            said = str(problem).strip().splitlines() or [type(problem).__name__]
            raise ValueError(f"{options.checkpoint} cannot be written as {kind}: {said[0]}") from problem
        run = onnx_session(path) if kind == "onnx" else torch.export.load(path).module()
        worst = difference(model, run, shape, options.batch)
        code |= worst > CLOSE
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; logits differ by {worst:.1e} from torch's"
              f"{'' if worst <= CLOSE else f', which is more than {CLOSE:g}: do not use it'}", flush=True)  # fmt: skip
        runs |= {"onnxruntime": run} if kind == "onnx" else {}
    print("compiling with torch.compile, which takes a minute or so", flush=True)
    torch.compiler.reset()
    runs["torch, compiled"] = torch.compile(model, dynamic=False)
    table = timings(runs, shape, options.batch, options.seconds)
    lines = [(f"ms, threads: {torch.get_num_threads()}", *(f"batch {b}" for b in table))]
    print("\n" + columns(lines + [(name, *(f"{table[b][name]:.2f}" for b in table)) for name in runs]))
    return int(code)
