"""Reading boxes from COCO's JSON and saved data sets, and what is said of those that are wrong."""

from dataclasses import replace

import datasets
import pytest
import torch
from cocos import HEIGHT, WIDTH, pixels, write_coco
from PIL import Image

from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.box_files import BoxesConfig, check_boxes, load_boxes, read_coco


def test_coco_is_read(tmp_path):
    found = read_coco(tmp_path, write_coco(tmp_path))
    assert found.classes == ("cat", "dog") and found.rows == (0, 2)
    assert [each["class_labels"].tolist() for each in found.targets] == [[1, 0], [0]]
    # centre 4 of 20 and 3.5 of 10; the second box is cut at the edge
    torch.testing.assert_close(
        found.targets[0]["boxes"], torch.tensor([[0.2, 0.35, 0.2, 0.5], [0.875, 0.75, 0.25, 0.5]])
    )
    assert torch.equal(found.picture(1), torch.from_numpy(pixels(2)).permute(2, 0, 1))


def test_training_and_test_files(tmp_path):
    path = write_coco(tmp_path)
    other = write_coco(tmp_path, lambda table: table["categories"].reverse(), "other.json")
    config = BoxesConfig(path=str(tmp_path), annotations=str(path), test_annotations=str(other))
    train, test = load_boxes(config, 0)
    assert train.classes == test.classes and train.counts == test.counts == {0: 2, 1: 1}
    assert len(load_boxes(replace(config, limit=1), 0)[0]) == 1


def edit(place, **values):
    return lambda table: table["annotations"][place].update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit(0, category_id=9), r"annotation 1: no category 9 among 2 \(3 cat, 7 dog"),
        (edit(0, image_id=99), "annotation 1: no image 99"),
        (edit(0, bbox=[15, 5, 9, 4]), r"image 0\.png: expected a box within the image of 20x10 .*left 15.*xyxy"),
        (edit(0, bbox=[-3, 5, 9, 4]), "within the image"),
        (edit(0, bbox=[3, 5, -1, 4]), "within the image"),
        (edit(0, bbox=[3, 5, float("nan"), 4]), "within the image"),
        (lambda table: table["annotations"].clear(), "expected boxes, found none on its 3 images"),
        (lambda table: table.pop("categories"), "expected COCO's JSON"),
        (lambda table: table["images"][0].update(file_name="no.png"), r"names 1 of 3 images.*no\.png"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        read_coco(tmp_path, write_coco(tmp_path, change))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    found = read_coco(tmp_path, write_coco(tmp_path))
    (tmp_path / "2.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"2\.png: cannot read the image"):
        found.picture(1)


def saved(folder, objects, feature=None, **more):
    names = feature or datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {"bbox": [[datasets.Value("float32")]], "category": [names]},
            **{key: datasets.Value("int32") for key in more},
        }
    )
    rows = {"image": [Image.fromarray(pixels(i)) for i in range(len(objects))], "objects": objects, **more}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return BoxesConfig(path=str(folder), test_share=0.5)


OBJECTS = [{"bbox": [[2, 1, 4, 5], [0, 0, 20, 10]], "category": [1, 0]}] * 4


def test_a_saved_data_set_is_read(tmp_path):
    train, test = load_boxes(saved(tmp_path / "set", OBJECTS), 0)
    assert (len(train), len(test)) == (2, 2) and train.classes == ("cat", "dog")
    torch.testing.assert_close(train.targets[0]["boxes"][0], torch.tensor([0.2, 0.35, 0.2, 0.5]))
    assert train.picture(0).shape == (3, HEIGHT, WIDTH)
    config = saved(tmp_path / "sized", OBJECTS, width=[40] * 4, height=[10] * 4)
    torch.testing.assert_close(load_boxes(config, 0)[0].targets[0]["boxes"][0], torch.tensor([0.1, 0.35, 0.1, 0.5]))


def test_corners_and_names(tmp_path):
    objects = [{"bbox": [[2, 1, 6, 6]], "category": ["dog"]}, {"bbox": [[2, 1, 6, 6]], "category": ["cat"]}] * 2
    config = replace(saved(tmp_path / "set", objects, datasets.Value("string")), corners="xyxy", test_share=0.25)
    train, _ = load_boxes(config, 1)
    assert train.classes == ("cat", "dog")
    torch.testing.assert_close(train.targets[0]["boxes"][0], torch.tensor([0.2, 0.35, 0.2, 0.5]))


def test_wrong_data_sets_are_named(tmp_path):
    config = saved(tmp_path / "set", OBJECTS)
    with pytest.raises(DataError, match=r"no column 'object'; set data\.objects_column\. There is objects"):
        load_boxes(replace(config, objects_column="object"), 0)
    with pytest.raises(DataError, match="within the image"):
        load_boxes(saved(tmp_path / "out", [{"bbox": [[2, 1, 40, 5]], "category": [0]}]), 0)
    with pytest.raises(DataError, match="unknown category -1"):
        load_boxes(saved(tmp_path / "none", [{"bbox": [[2, 1, 4, 5]], "category": [-1]}]), 0)
    with pytest.raises(DataError, match="save_to_disk"):
        load_boxes(BoxesConfig(path=str(tmp_path)), 0)


def test_settings_that_contradict_each_other():
    for config in (
        BoxesConfig(test_share=1.0),
        BoxesConfig(path="a", annotations="b", test_path="c"),
        BoxesConfig(test_annotations="b"),
    ):
        with pytest.raises(ConfigError):
            check_boxes(config)
