"""Objrefs in order of appearance."""

from migrator.image.objhash import ObjHash


def test_the_first_to_meet_an_object_is_told_to_save_it() -> None:
    objhash = ObjHash()
    assert objhash.get(("mm", 7)) == (1, True)
    assert objhash.get(("file", 7)) == (2, True)
    assert objhash.get(("mm", 7)) == (1, False)
    assert len(objhash) == 2


def test_an_object_never_met_has_no_objref() -> None:
    objhash = ObjHash()
    assert objhash.find("nothing") == 0
    assert "nothing" not in objhash
    objhash.get("something")
    assert objhash.find("something") == 1
    assert "something" in objhash
