"""How a backbone and a classifier are judged: options of `evaluation.*`. Imports no torch."""

from typing import Self

from pydantic import Field, model_validator

from training.config import Config


class LinearProbe(Config):
    """Multinomial logistic regression on frozen, standardised features, minimised by L-BFGS over all of them."""

    weight_decay: float = Field(
        1e-4, ge=0, description="half of it times the weights' squared norm joins the mean cross-entropy, in nats; "
        "the bias goes free. scikit-learn's C is 1 over it times the number of images")
    max_iterations: int = Field(
        1000, gt=0, description="of L-BFGS, which ends sooner where no entry of the gradient exceeds "
        "1e-5, or where float32 gains no more")


class Evaluation(Config):
    """Weighted k-NN on frozen features (Wu et al., arXiv 1805.01978, section 3.4); VISSL's figures by default.

    A classifier is judged by top-1 and top-5 instead; all see one centre crop of every image.
    """

    knn_k: int = Field(200, gt=0, description="neighbours that vote; lowered to the size of the train split")
    knn_temperature: float = Field(
        0.1, gt=0, description="T: a neighbour of cosine similarity s votes with weight exp(s / T)")
    batch_size: int = Field(256, gt=0, description="images per forward pass while features are computed")
    resize_size: int = Field(
        256, gt=0, description="pixels to which an image's shortest side is brought before the centre crop")
    crop_size: int = Field(
        224, gt=0, description="side of the centre crop in pixels; small images want both sizes equal to their own")
    linear_probe: LinearProbe = Field(LinearProbe(), description="the linear classifier on frozen features")

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop_size > self.resize_size:
            raise ValueError(f"crop_size of at most resize_size = {self.resize_size}, not {self.crop_size}")
        return self
