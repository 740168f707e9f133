"""The one door to the rows: sources become what the trainer gets, and the audit of both."""

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from sft_recipes.config.schema import Config
from sft_recipes.data.packing import add_length_column, pack_rows
from sft_recipes.data.prepare import TrainingData, load_data
from sft_recipes.data.streaming import RowStream, load_stream
from sft_recipes.encoding.encoder import Encoder


def prepare_rows(
    config: Config, encoder: Encoder, arguments: SFTConfig
) -> tuple[TrainingData, Dataset | IterableDataset, RowStream | None]:
    """The rows as they are read, as the trainer gets them, and the stream they come from, if they are streamed."""
    if config.streamed:
        data, stream = load_stream(config, encoder, arguments.max_length, arguments.packing)
        return data, stream.dataset(), stream
    data = load_data(config, encoder, arguments.max_length)
    if arguments.packing and len(data.train):
        return data, pack_rows(data.train, arguments.max_length, config.seed), None
    return data, add_length_column(data.train), None
