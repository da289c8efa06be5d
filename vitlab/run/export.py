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


def difference(model, other, shape, batches):
    """The largest difference of a logit between two functions of images, at all these batches."""
    with running([model], "cpu"):
        inputs = [example(model, shape, batch) for batch in batches]
        return max((model(images) - other(images)).abs().max().item() for images in inputs)


def export(options):
    """Write the files asked for; a difference above CLOSE is an error (exit code 1)."""
    if not options.onnx and not options.pt2:
        raise ValueError("nothing to do: give --onnx, --pt2, or both")
    model = checkpoint.load(options.checkpoint)
    shape = model.config.in_chans, model.config.image_size, model.config.image_size
    folder, code = options.out or options.checkpoint.parent, 0
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"torch, eager": model}
    for kind in [kind for kind in ("onnx", "pt2") if getattr(options, kind)]:
        path, images = folder / f"{options.checkpoint.stem}.{kind}", example(model, shape, 2)
        print(f"writing {path}", flush=True)
        try:
            if kind == "onnx":
                to_onnx(model, path, images)
            else:
                torch.export.save(exported(model, images), path)
        except Exception as problem:  # whatever torch.export cannot trace
            raise ValueError(f"{options.checkpoint} cannot be written as {kind}: {_first(problem)}") from problem
        run = onnx_session(path) if kind == "onnx" else torch.export.load(path).module()
        worst = difference(model, run, shape, options.batch)
        code |= worst > CLOSE
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; logits differ by {worst:.1e} from torch's"
              f"{'' if worst <= CLOSE else f', which is more than {CLOSE:g}: do not use it'}", flush=True)  # fmt: skip
        if kind == "onnx":
            runs["onnxruntime"] = run
    print("compiling with torch.compile, which takes a minute or so", flush=True)
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False)
    try:
        difference(model, compiled, shape, options.batch)
        runs["torch, compiled"] = compiled
    except Exception as problem:  # no C++ compiler, an operation that cannot be compiled
        print(f"torch, compiled: not measured ({_first(problem)[:120]})", flush=True)
    table = []
    for batch in options.batch:
        timed = meters.compare(runs, example(model, shape, batch), warmup=2, seconds=options.seconds, min_runs=5)
        table.append([f"batch {batch}", *(f"{1e3 * timing.median_s:.2f}" for timing in timed.values())])
    head = [f"ms, threads: {torch.get_num_threads()}", *runs]
    print("\n" + columns(list(zip(head, *table))))
    return int(code)


def _first(problem):
    """The first line of what an exception says, or its name."""
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
