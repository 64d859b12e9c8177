import pytest

from classact.data.bag_files import DataError
from classact.data.boxes import box_mask, read_boxes

VOC = """<annotation><object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>3</ymax></bndbox>
</object><object><name>cat</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object>
</annotation>"""


def test_a_table_and_voc_files_give_the_same_boxes(tmp_path):
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "a.xml").write_text(VOC)
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\na.jpg,0,1,4,3\na.jpg,1,1,2,2\n")
    assert read_boxes(tmp_path / "voc") == read_boxes(tmp_path / "boxes.csv") == {"a": [(0, 1, 4, 3), (1, 1, 2, 2)]}


def test_boxes_as_masks():
    masks = box_mask([(0, 1, 4, 3), (2, 0, 9, 9)], 4, 5)
    assert masks.sum((1, 2)).tolist() == [8, 12]
    assert masks[0, 1:3, :4].all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "file,x0\na,1\n", "expected the columns file, x0, y0, x1, y1"),
        ("a.csv", "file,x0,y0,x1,y1\na,1,2,1,4\n", "line 2: a box must have x0 < x1"),
        ("a.csv", "file,x0,y0,x1,y1\na,1,2,x,4\n", "line 2: expected numbers"),
        ("voc/a.xml", "<annotation><object><bndbox/></object></annotation>", "not an annotation in the format"),
        ("voc/a.xml", "<annotation", "not an annotation in the format"),
        ("voc/a.txt", "", "no .xml files"),
    ],
)
def test_bad_boxes_are_named(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_boxes(tmp_path / name.split("/")[0])
