"""Faces as OpenCV alone finds them, for comparison."""
import cv2
import numpy as np


def all_faces(image):
    """[[x, y, width, height]] in an RGB picture, called as the checkpoints' training did."""
    detector = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    found = detector.detectMultiScale(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY), scaleFactor=1.1,
                                      minNeighbors=5, minSize=(60, 60), flags=cv2.CASCADE_SCALE_IMAGE)
    return np.array(found).reshape(-1, 4).tolist()
