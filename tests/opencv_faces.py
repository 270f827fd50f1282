"""Pictures with faces, and the faces as OpenCV alone finds them, for comparison."""
import cv2
import numpy as np
from conftest import photo


def all_faces(image):
    """[[x, y, width, height]] in an RGB picture, called as the checkpoints' training did."""
    detector = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    found = detector.detectMultiScale(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY), scaleFactor=1.1,
                                      minNeighbors=5, minSize=(60, 60), flags=cv2.CASCADE_SCALE_IMAGE)
    return np.array(found).reshape(-1, 4).tolist()


def collage(seed):
    """A photograph with up to three faces of any size pasted in."""
    random = np.random.default_rng(seed)
    background = photo(["coffee", "chelsea", "rocket", "astronaut"][seed % 4])
    width, height = map(int, random.integers(250, 1100, 2))
    image, astronaut = background.resize((width, height)), photo("astronaut")
    for _ in range(random.integers(0, 4)):
        side = int(random.integers(90, min(width, height)))
        face = astronaut.crop((80, 0, 410, 330)) if random.random() < 0.5 else astronaut
        place = int(random.integers(0, width - side + 1)), int(random.integers(0, height - side + 1))
        image.paste(face.resize((side, side)), place)
    return image.crop((width // 6, height // 6, width - 60, height - 60)) if seed % 2 else image  # faces at the edges
