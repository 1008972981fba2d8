"""Three small images and COCO's JSON of the boxes on two of them."""

import json

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 20, 10


def pixels(number):
    return np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8)


def write_coco(folder, change=lambda table: None, name="boxes.json"):
    """Write three images, one without boxes, and COCO's JSON of them."""
    for number in range(3):
        Image.fromarray(pixels(number)).save(folder / f"{number}.png")
    table = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(3)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [2, 1, 4, 5]},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [15, 5, 5.5, 5]},
            {"id": 3, "image_id": 12, "category_id": 3, "bbox": [0, 0, 20, 10]},
            {"id": 4, "image_id": 11, "category_id": 3, "bbox": [0, 0, 20, 10], "iscrowd": 1},
            {"id": 5, "image_id": 12, "category_id": 7, "bbox": [3, 3, 0, 4]},
        ],
    }
    change(table)
    path = folder / name
    path.write_text(json.dumps(table))
    return path
