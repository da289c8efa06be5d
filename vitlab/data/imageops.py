"""The image operations of RandAugment, TrivialAugment and colour jitter, on a whole batch.

Each image of a batch has its own operation and magnitude: `apply_operations(images, operation, magnitude)`.
The formulas are torchvision's (nearest neighbour, black outside). On the CPU the images are grouped by
operation; elsewhere every image goes through one look-up table, one saturation blend, one sharpness blend and
one affine gather, with neutral parameters where another operation was drawn, so that nothing waits for the
host. Both ways give the same pixels.
"""

import torch
import torch.nn.functional as F

# the order of torchvision's `_augmentation_space`; Hue is only drawn by `Jitter`
OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
              "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
              "Hue")  # fmt: skip
CODE = {name: code for code, name in enumerate(OPERATIONS)}
DRAWN = OPERATIONS[:14]


def _each(values):
    """B -> B 1 1 1, float32."""
    return values.float().view(-1, 1, 1, 1)


def _grey(images):
    """Luma of float images in 0..255, whole levels: B 3 H W -> B 1 H W; one channel stays as it is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


# --- operations on single pixel values: (images B C H W, magnitude B) -> table uint8, B C 256 or B 1 256


def _levels(images):
    return torch.arange(256, dtype=torch.float32, device=images.device).view(1, 1, 256)


def _table(levels):
    return levels.clamp(0, 255).to(torch.uint8)


def _brightness(images, magnitude):
    return _table(_levels(images) * (1 + magnitude).float().view(-1, 1, 1))


def _contrast(images, magnitude):
    mean = _grey(images.float()).mean((2, 3))[..., None]  # B 1 1
    factor, rest = (1 + magnitude).float().view(-1, 1, 1), (-magnitude).float().view(-1, 1, 1)
    return _table(_levels(images) * factor + mean * rest)


def _posterize(images, magnitude):
    step = torch.exp2(8 - magnitude.float().clamp(0, 8)).view(-1, 1, 1)
    return _table((_levels(images) / step).floor() * step)


def _solarize(images, magnitude):
    levels = _levels(images)
    return _table(torch.where(levels >= magnitude.float().view(-1, 1, 1), 255 - levels, levels))


def _autocontrast(images, magnitude):
    low, high = (v.float().unsqueeze(-1) for v in torch.aminmax(images.flatten(2), dim=2))  # B C 1
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return _table((_levels(images) - torch.where(flat, 0.0, low)) / scale)


def _equalize(images, magnitude):
    """PIL's scheme: the cumulative histogram in steps of (pixels below the maximum) // 255."""
    pixels = images.flatten(2).long()  # B C HW
    counts = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    cumulated = counts.cumsum(2)
    brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255  # B C 1
    table = (cumulated - counts + step // 2) // step.clamp(min=1)
    identity = torch.arange(256, device=images.device).expand_as(table)
    return torch.where(step == 0, identity, table.clamp(max=255)).to(torch.uint8)


TABLES = {"Brightness": _brightness, "Contrast": _contrast, "Posterize": _posterize, "Solarize": _solarize,
          "AutoContrast": _autocontrast, "Equalize": _equalize}  # fmt: skip


def _look_up(images, table):
    """Replace every pixel by its entry in the image's table (B C 256 or B 1 256)."""
    shape = images.shape
    table = table.expand(shape[0], shape[1], 256)
    return table.gather(2, images.flatten(2).long()).view(shape)


# --- operations that look at several channels or neighbours: (images B C H W, magnitude B) -> images


def _saturate(images, magnitude):
    if images.shape[1] == 1:
        return images
    pixels = images.float()
    return (pixels * _each(1 + magnitude) + _grey(pixels) * _each(-magnitude)).clamp_(0, 255).to(torch.uint8)


def _sharpen(images, magnitude):
    """Blend with a 3 x 3 smoothing (5 in the middle, 1 around, over 13); the border stays."""
    if min(images.shape[2:]) <= 2:
        return images
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    inner = pixels[:, :, 1:-1, 1:-1]
    # sums of whole numbers are exact in any order, unlike a convolution that may run in TF32
    smooth = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round_()
    inner += (smooth - inner) * _each(-magnitude)
    return pixels.clamp_(0, 255).to(torch.uint8)


def _hue(images, magnitude):
    """Turn the hue by `magnitude` of a circle, through HSV."""
    if images.shape[1] == 1:
        return images
    pixels = images.float() / 255
    red, green, blue = pixels.unbind(1)
    low, value = torch.aminmax(pixels, dim=1)
    spread = value - low
    divisor = torch.where(spread == 0, 1.0, spread)
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + 6 * magnitude.float().view(-1, 1, 1)
    # each channel is the value less the spread times a trapezium of the hue; 5, 3 and 1 place its foot
    corner = torch.arange(5, 0, -2, device=images.device)
    place = (hue.unsqueeze(1) + corner.view(1, 3, 1, 1)).remainder_(6)
    channels = value.unsqueeze(1) - spread.unsqueeze(1) * torch.minimum(place, 4 - place).clamp_(0, 1)
    return (channels * (256 - 1e-3)).to(torch.uint8)


# --- affine operations: magnitude B -> B 2 3, from output to input pixels measured from the centre


def _matrix(magnitude, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    entries = [v if torch.is_tensor(v) else torch.full_like(magnitude, v) for v in (a, b, c, d, e, f)]
    return torch.stack(entries, 1).view(-1, 2, 3)


def _rotation(m, height, width):
    """Counter-clockwise by `m` degrees about the centre."""
    cos, sin = torch.cos(torch.deg2rad(m)), torch.sin(torch.deg2rad(m))
    return _matrix(m, a=cos, b=-sin, d=sin, e=cos)


# torchvision shears about the top left corner and moves by whole pixels
MATRICES = {
    "ShearX": lambda m, height, width: _matrix(m, b=m, c=m * height / 2),
    "ShearY": lambda m, height, width: _matrix(m, d=m, f=m * width / 2),
    "TranslateX": lambda m, height, width: _matrix(m, c=-m.trunc()),
    "TranslateY": lambda m, height, width: _matrix(m, f=-m.trunc()),
    "Rotate": _rotation,
}


def affine(images, matrix):
    """Nearest-neighbour affine map, black outside. images B C H W; matrix float64 B 2 3, output to input."""
    height, width = images.shape[2:]
    device = images.device
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = torch.arange(height, device=device) - (height - 1) / 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    base = torch.stack((x, y, torch.ones_like(x)), -1)  # H W 3
    half = x.new_ones(2)
    half[0], half[1] = width / 2, height / 2
    theta = matrix.float().transpose(1, 2) / half  # B 3 2
    grid = base.view(1, -1, 3).expand(len(images), -1, -1).bmm(theta).view(-1, height, width, 2)
    moved = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(images.dtype)


def rotate(images, degrees):
    """Rotate each image about its centre by its own angle. images B C H W; degrees B, counter-clockwise."""
    return affine(images, _rotation(degrees.double(), *images.shape[2:]))


# --- applying what was drawn


def _apply_one(name, images, magnitude):
    if name == "Identity" or not len(images):
        return images
    if name in TABLES:
        return _look_up(images, TABLES[name](images, magnitude))
    if name in MATRICES:
        return affine(images, MATRICES[name](magnitude, *images.shape[2:]))
    return {"Color": _saturate, "Sharpness": _sharpen, "Hue": _hue}[name](images, magnitude)


def _apply_grouped(images, operation, magnitude, names):
    order = operation.argsort()
    counts = operation.bincount(minlength=len(OPERATIONS)).tolist()
    groups = zip(OPERATIONS, images.index_select(0, order).split(counts), magnitude[order].split(counts))
    done = [_apply_one(name, group, amount) if name in names else group for name, group, amount in groups]
    return torch.cat(done).index_select(0, order.argsort())


def _apply_all(images, operation, magnitude, names):
    def drawn(name):
        return (operation == CODE[name]).view(-1, 1, 1)

    def only(name):
        return torch.where(operation == CODE[name], magnitude, 0.0)

    table = torch.arange(256, device=images.device, dtype=torch.uint8).expand(len(images), 1, 256)
    for name in TABLES.keys() & set(names):
        table = torch.where(drawn(name), TABLES[name](images, magnitude), table)
    changed = _look_up(images, table) if TABLES.keys() & set(names) else images
    if "Color" in names:
        changed = _saturate(changed, only("Color"))
    if "Sharpness" in names:
        changed = _sharpen(changed, only("Sharpness"))
    if "Hue" in names:  # RGB -> HSV -> RGB can move a level even at magnitude 0
        changed = torch.where(drawn("Hue").unsqueeze(1), _hue(changed, only("Hue")), changed)
    if MATRICES.keys() & set(names):
        matrix = _matrix(magnitude)
        for name in MATRICES.keys() & set(names):
            matrix = torch.where(drawn(name), MATRICES[name](magnitude, *images.shape[2:]), matrix)
        changed = affine(changed, matrix)
    return changed


def apply_operations(images, operation, magnitude, names=DRAWN, grouped=None):
    """Apply to each image its own operation.

    images: B 1|3 H W, uint8, or float in [0, 1] (which then passes through 8 bits); operation: int64 B, an
    index into OPERATIONS; magnitude: float64 B in torchvision's units (shear: tangent; translation: pixels;
    Rotate: degrees; Brightness, Color, Contrast, Sharpness: factor - 1; Posterize: bits; Solarize:
    threshold; Hue: turns); names: the operations that may occur; grouped: which of the two ways, by default
    the one that suits the device. ValueError on another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"colour operations need images of 1 or 3 channels, not {images.shape[1]}")
    if images.is_floating_point():
        levels = images.mul(255).round_().clamp_(0, 255).to(torch.uint8)
        return apply_operations(levels, operation, magnitude, names, grouped).to(images.dtype) / 255
    grouped = images.device.type == "cpu" if grouped is None else grouped
    return (_apply_grouped if grouped else _apply_all)(images, operation, magnitude, names)
