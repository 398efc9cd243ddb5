"""Configuration of generation: which images to make, how, and in what form to store them."""

from __future__ import annotations

from pydantic import Field, field_validator

from diffusion_core.config import Config, execution
from diffusion_core.diffusion.config import GuidanceConfig, SamplerConfig
from diffusion_core.diffusion.kinds import Choice

MAX_IMAGE_ID = 2**62


class ImageFormat(Choice):
    """How the images of a set are stored."""

    PARQUET = "parquet", "Parquet shards in the Hugging Face image layout"
    WEBDATASET = "webdataset", "one tar per shard with <image id>.png, .json and, if there are classes, .cls"
    PNG = "png", "one folder of PNG files per shard with a metadata.jsonl (Hugging Face image-folder layout)"


class SamplingPrecision(Choice):
    """Number format of the network while sampling; the sampler itself stays in float32."""

    FLOAT32 = "float32", "full precision"
    BFLOAT16 = "bfloat16", "faster, with small rounding differences"


LABEL_FILES = (".txt", ".csv", ".jsonl", ".parquet")


class GenerationConfig(Config):
    """An image set and the range of it that is wanted.

    An image is a function of the model version, the identity fields and its image id, of nothing else. Batches are
    aligned to absolute image ids: image `i` is always computed in slot `i % batch_size` of batch `i // batch_size`.
    """

    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="The sampler and its number of steps.")
    guidance: GuidanceConfig = Field(
        default_factory=GuidanceConfig, description="Guidance, by leaving the label out or by a weaker model."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all noise.")
    labels: str | tuple[int | str, ...] = Field(
        "balanced",
        description="Class of each image: 'balanced' (image i gets class i mod the number of classes), a list of class "
        "names or numbers (image i gets entry i mod its length), or a file with such a list: .txt (one per line), "
        ".csv, .jsonl or .parquet.",
    )
    label_column: str = Field("label", min_length=1, description="Column of a .csv, .jsonl or .parquet label file.")
    batch_size: int = Field(64, ge=1, le=65536, description="Images that are computed together.")
    precision: SamplingPrecision = Field(
        SamplingPrecision.FLOAT32, description=f"Precision of the network. {SamplingPrecision.explained()}"
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of each worker.")
    format: ImageFormat = Field(ImageFormat.PARQUET, description=f"How images are stored. {ImageFormat.explained()}")
    images_per_shard: int = Field(
        1024, ge=1, le=1_000_000, description="Images in a shard; best a multiple of batch_size."
    )

    count: int = execution(1000, ge=1, le=1_000_000_000, description="Number of images wanted.")
    first_image_id: int | None = execution(
        None,
        ge=0,
        le=MAX_IMAGE_ID,
        description="First image id of the range; images that exist are found done. Default: the next free ids, or "
        "those that a request of the same count left unfinished.",
    )
    max_failed_shards: int = execution(0, ge=0, description="Shards that may fail without failing the job.")
    max_retries: int = execution(2, ge=0, le=100, description="Times that a failed shard is tried again.")
    shards_per_block: int = execution(
        256, ge=1, le=4096, description="Most shards that a worker takes from the queue at once."
    )

    @field_validator("labels")
    @classmethod
    def _known_form(cls, labels: str | tuple[int | str, ...]) -> str | tuple[int | str, ...]:
        if not labels:
            raise ValueError("give 'balanced', a list of classes, or a label file")
        if isinstance(labels, str) and labels != "balanced" and not labels.lower().endswith(LABEL_FILES):
            raise ValueError(f"give 'balanced', a list of classes, or a file that ends with {' or '.join(LABEL_FILES)}")
        return labels
