"""What can be said about a source of images and the dataset version made from it. No heavy import here."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from diffusion_core.config import Config, execution

Channel = Annotated[int, Field(ge=0, le=255)]


class SourceKind(StrEnum):
    """How the images of a source are stored."""

    AUTO = "auto"  # decided by what lies at the URI
    FOLDER = "folder"  # image files; class sub-folders give labels, metadata.csv or metadata.jsonl labels and captions
    PARQUET = "parquet"  # the Hugging Face image layout: image {bytes, path} or raw bytes, label, text, split
    IDX = "idx"  # the files of MNIST and Fashion-MNIST, plain or .gz
    NPZ = "npz"  # arrays images and labels, or x_train, y_train, x_test, y_test
    DIGITS = "digits"  # the 1,797 handwritten digits that come with scikit-learn; needs no URI


class LabelSource(StrEnum):
    """Where labels come from."""

    AUTO = "auto"  # whatever the source offers
    CLASS_FOLDERS = "class_folders"  # the first folder below the root (or below the split's folder)
    METADATA = "metadata"  # the label column of metadata.csv or metadata.jsonl
    COLUMN = "column"  # the label column or array of Parquet, IDX, .npz and digits
    NONE = "none"  # no labels: an unconditional dataset


class SplitSource(StrEnum):
    """Where the division into train and test comes from."""

    AUTO = "auto"  # split-named folders or files (train, test, validation, ...), or a split column
    NONE = "none"  # ignore such names; test_fraction alone decides


class ResizeFilter(StrEnum):
    """Resampling filters of Pillow."""

    LANCZOS = "lanczos"  # sharpest; the default
    BICUBIC = "bicubic"
    HAMMING = "hamming"
    BILINEAR = "bilinear"
    BOX = "box"  # plain average of the covered pixels
    NEAREST = "nearest"  # no blending: for index-like or pixel-art images


class SourceConfig(Config):
    """Where images come from. URI and kind say only where to look; the content decides the dataset's version."""

    kind: SourceKind = execution(SourceKind.AUTO, description="How the images are stored; auto looks at the URI.")
    uri: str | None = execution(
        None, description="Local path, file:// or s3:// URI of a folder or a file; none for the bundled digits."
    )
    labels: LabelSource = Field(LabelSource.AUTO, description="Where labels come from.")
    splits: SplitSource = Field(SplitSource.AUTO, description="Where the division into train and test comes from.")
    image_column: str | None = Field(None, min_length=1, description="Image column (Parquet) if not image, img, jpg...")
    label_column: str | None = Field(None, min_length=1, description="Label column, if not label, labels or class.")
    text_column: str | None = Field(None, min_length=1, description="Caption column, if not text, caption or prompt.")
    split_column: str | None = Field(None, min_length=1, description="Split column (Parquet), if not split.")
    class_names: tuple[str, ...] | None = Field(
        None, min_length=1, description="Names of the classes 0, 1, 2, ... where labels are numbers without names."
    )

    @field_validator("class_names")
    @classmethod
    def _distinct(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) != len(names):
            raise ValueError("class names must differ from each other")
        return names

    @model_validator(mode="after")
    def _uri_is_needed(self) -> SourceConfig:
        if self.kind is SourceKind.DIGITS and self.uri is not None:
            raise ValueError("the bundled digits have no URI: leave uri out, or choose another kind")
        if self.kind not in (SourceKind.DIGITS, SourceKind.AUTO) and not self.uri:
            raise ValueError(f"kind {self.kind.value} needs a uri: a local path or s3://bucket/prefix")
        if self.kind is SourceKind.AUTO and not self.uri:
            raise ValueError("a uri is needed (a local path or s3://bucket/prefix), or kind digits")
        return self


class DatasetConfig(Config):
    """How a source becomes a dataset version: the pixels, the splits, the order of rows."""

    name: str = execution(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$",
        description="Name of the dataset in the store: lower-case letters, digits, dot, dash and underscore.",
    )
    image_size: int | tuple[int, int] | None = Field(
        None, description="Size in pixels, one number or [height, width]; none keeps the size, which must be one."
    )
    channels: int = Field(3, description="1 (grey) or 3 (red, green, blue).")
    filter: ResizeFilter = Field(ResizeFilter.LANCZOS, description="Resampling filter for shrinking images.")
    background: tuple[Channel, Channel, Channel] = Field(
        (255, 255, 255), description="Colour that shows through transparent pixels, as red, green, blue."
    )
    allow_upscale: bool = Field(False, description="Enlarge images that are too small instead of rejecting them.")
    test_fraction: float = Field(
        0.1, ge=0, le=0.9, description="Share of the images held out as test, if the source has no test split."
    )
    rows_per_shard: int | None = Field(
        None, ge=1, le=1_000_000, description="Images in a shard; none chooses about 32 MiB, at most 8,192 images."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the row order and of the held-out choice.")
    max_pixels: int = Field(
        64_000_000, ge=1, le=178_000_000, description="Larger images are rejected before they are decoded."
    )
    max_file_mb: int = Field(256, ge=1, le=2048, description="Larger image files are rejected unread.")
    max_rejected_fraction: float = execution(
        0.05, ge=0, le=1, description="The job fails if a larger share of the images had to be rejected."
    )

    @field_validator("channels")
    @classmethod
    def _grey_or_colour(cls, channels: int) -> int:
        if channels not in (1, 3):
            raise ValueError("it must be 1 (grey) or 3 (red, green, blue)")
        return channels

    @field_validator("image_size")
    @classmethod
    def _size_in_bounds(cls, size: Any) -> Any:
        for side in size if isinstance(size, tuple) else (size,):
            if side is not None and not 1 <= side <= 4096:
                raise ValueError("each side must lie between 1 and 4096 pixels")
        return size

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), or None if the size of the source's images is kept."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def shard_rows(self, image_bytes: int) -> int:
        """Images in a full shard, for images of so many bytes each."""
        return self.rows_per_shard or max(1, min(8192, (32 << 20) // image_bytes))
