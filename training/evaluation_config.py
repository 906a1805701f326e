"""How a backbone is judged: options of `evaluation.*`. Imports no torch."""

from pydantic import Field

from training.config import Config


class Evaluation(Config):
    """Weighted k-NN on frozen features (Wu et al., arXiv 1805.01978, section 3.4); VISSL's figures by default."""

    knn_k: int = Field(200, gt=0, description="neighbours that vote; lowered to the size of the train split")
    knn_temperature: float = Field(
        0.1, gt=0, description="T: a neighbour of cosine similarity s votes with weight exp(s / T)")
    batch_size: int = Field(256, gt=0, description="images per forward pass while features are computed")
