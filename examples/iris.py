"""The species of an iris, by scikit-learn's logistic regression.

    python -m examples.iris                  # trains it and writes MODEL_PATH, by default iris.skops in MODEL_DIR
    MODEL_NAME=examples.iris:Iris make run   # serves it
"""
import reprlib

import skops.io
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from app.config import Settings, StartError
from app.tasks.own import InvalidInput, OwnTask

LONGEST_CM = 100


def model_file(settings):
    return settings.model_path or settings.model_dir / "iris.skops"


class Iris(OwnTask):
    """The species of an iris, from the lengths and widths of its sepals and petals in cm."""
    takes = "json"
    field = "features"
    input_schema = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
    example = [5.1, 3.5, 1.4, 0.2]  # sepal length, sepal width, petal length, petal width

    def load(self):
        path = model_file(self.settings)
        try:
            self.model = skops.io.load(path)  # refuses everything but known types of scikit-learn and numpy: no code
        except FileNotFoundError as e:
            raise StartError(f"{path} does not exist: python -m examples.iris trains the model and writes it") from e
        except Exception as e:  # whatever a damaged file leads to
            why = str(e).partition("\n")[0]
            raise StartError(f"{path} is not a model that skops can load: {why}") from e
        found = type(self.model).__name__, getattr(self.model, "n_features_in_", 0)
        if found != ("LogisticRegression", len(self.example)):
            raise StartError(f"{path} holds a {found[0]} of {found[1]} features, expected a LogisticRegression of 4")

    def decode(self, value, options):
        if (not isinstance(value, list) or len(value) != len(self.example)
                or not all(type(number) in (int, float) and 0 <= number <= LONGEST_CM for number in value)):
            raise InvalidInput(f"must be a list of 4 numbers from 0 to {LONGEST_CM}, got {reprlib.repr(value)}")
        return value

    def predict(self, batch):
        return self.model.predict_proba(batch)  # (N, 3), a column for each species

    def encode(self, output, options):
        probabilities = dict(zip(self.model.classes_, output, strict=True))
        return {"class": max(probabilities, key=probabilities.get), "probabilities": probabilities}


def train():
    iris, path = load_iris(), model_file(Settings.load())
    species = iris.target_names[iris.target]
    model = LogisticRegression(max_iter=1000)
    accuracy = cross_val_score(model, iris.data, species, cv=5).mean()
    path.parent.mkdir(parents=True, exist_ok=True)
    skops.io.dump(model.fit(iris.data, species), path)
    print(f"{path}: accuracy {accuracy:.3f} in 5-fold cross-validation")


if __name__ == "__main__":
    train()
