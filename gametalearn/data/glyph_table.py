"""The characters of the embedded data set `glyphs`, by script, with the split that each script is in.

1046 classes: 601 train, 174 val, 271 test.

========================  =====  ====
group                     split  size
========================  =====  ====
Latin                     train   152
Greek                     train    24
Canadian Aboriginal       train   117
Coptic                    train     6
Lisu                      train     7
Latin Fraktur             train    31
Latin calligraphic        train    10
Mathematical symbols      train    63
Technical symbols         train    79
Arrows                    train    68
Punctuation and currency  train    44
Cyrillic                  val     102
Old Italic                val      13
Ogham                     val      18
Lao                       val      41
Georgian                  test     89
Armenian                  test     49
Arabic                    test     46
Hebrew                    test     18
Tifinagh                  test     38
N'Ko                      test     31
========================  =====  ====

"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCRIPTS", "Script"]


@dataclass(frozen=True)
class Script:
    """A group of classes: the letters and digits of one script, or symbols of one kind.

    Attributes:
        name: the script.
        split: ``train``, ``val`` or ``test``; a script is in one split only.
        letters: it is a script of its own; False for symbols and for styles of Latin.
        codes: its characters, as hexadecimal code points and ranges that include their end.
    """

    name: str
    split: str
    letters: bool
    codes: str

    @property
    def characters(self) -> str:
        """The characters, in the order of their code points.

        >>> Script("Greek", "train", True, "3B3-3B5 3C8").characters
        'γδεψ'
        """
        ends = [part.split("-") for part in self.codes.split()]
        return "".join(chr(c) for e in ends for c in range(int(e[0], 16), int(e[-1], 16) + 1))


SCRIPTS = (
    Script(
        "Latin",
        "train",
        True,
        "32-38 41 44-48 4C-4E 51-52 54 61-67 6B 6D-74 76-7A C6 D0 DE-DF E6 111 126 141 14B "
        "166-167 181 183 188 18A 18C 191-192 195 197 199 19B 19D 1A2 1A4-1A6 1AA-1AB 1B5 1B8 "
        "1BA-1BB 1BE-1BF 1C2 1E4 221 224 234-236 238 23A-23B 23E-242 244 246-247 24D-24F 258 25E "
        "264 26E 276-277 279 281 283 28A 28D-28E 295-297 29A 29E 2A3-2A4 2A6-2A7 2A9-2AD 1D03 "
        "1D0B 1D12 1D14-1D16 1D1E 1D6B 1EFA-1EFB A722 A724 A726 A728-A729 A72C A732 A734 "
        "A736-A739 A73C-A73D A746 A768 A77B A786 A7FD A7FF",
    ),
    Script(
        "Greek",
        "train",
        True,
        "372 39E 3A8-3A9 3B1-3B2 3B6 3B8 3BB-3BE 3C0 3C8 3CF 3D7 3D9 3DE 3E0-3E1 3FA-3FB 3FE-3FF",
    ),
    Script(
        "Canadian Aboriginal",
        "train",
        True,
        "1402 1405 140A 141E-141F 1421-1425 1429-142E 1433 1438 1449 144D 1466-146A 146C "
        "1483-1488 148A 14A1 14C0-14C2 14C4 14C7 14D0 14D2-14D5 14D7 14DA 14EA 14EC 14EE-14EF "
        "14F1 14F4 1505-1506 1510-1511 1513 1515 1525-1528 152A 152D 153E 1541-1546 154A 1550 "
        "1552-1555 1557 1559 155F 1561 1564 1566 156A 1574-1575 1577 1579 157B 157E-157F 1581 "
        "1583 1585 158A-158F 1591 1593 1595-1596 15A0 15A2 15A4 15A6-15A8 15AA 15AC 1646 "
        "166F-1671 1673",
    ),
    Script(
        "Coptic",
        "train",
        True,
        "3E2 3E4 3E6-3E7 3E9 3EC",
    ),
    Script(
        "Lisu",
        "train",
        True,
        "A4D5 A4D8 A4E4 A4EC-A4ED A4EF A4F7",
    ),
    Script(
        "Latin Fraktur",
        "train",
        False,
        "1D56C-1D574 1D576-1D57C 1D57E-1D57F 1D582-1D585 1D58A 1D58C 1D58E 1D590 1D593 1D595 "
        "1D598 1D59D 1D59F",
    ),
    Script(
        "Latin calligraphic",
        "train",
        False,
        "210B 2110 2112-2113 2118 211B 212F-2131 2133",
    ),
    Script(
        "Mathematical symbols",
        "train",
        False,
        "220A 220D 2213 221A-221B 221D 221F-2222 2234-2235 2237 2239-223A 223F 224D-224E 2250 "
        "2258-225A 225E 2263 228D 228F 2297 229B 229F-22A0 22A2-22A3 22A7-22AB 22B9 22BB-22BC "
        "22BE 22C4 22C6-22CB 22D0-22D2 22D4 22F0-22F3 22F6 22F9-22FA 22FC-22FD 27C8-27C9",
    ),
    Script(
        "Technical symbols",
        "train",
        False,
        "2301-2304 2306 230D 2314-2315 2318 2325-2326 232B-232C 2336 2338-233C 233E 2341-2350 "
        "2352-2357 2359-2365 2368-236B 236E-2372 2376-2379 2380-2383 2387-2389 238B 2395 23CE "
        "23E5",
    ),
    Script(
        "Arrows",
        "train",
        False,
        "2190-2199 219F 21A1 21A4 21A6-21A8 21AB-21AC 21AF-21BA 21C4-21CC 21D0-21D2 21D6-21DB "
        "21DE 21E4-21E5 21E9 21ED-21F2 21F5-21F9 27F0-27F4",
    ),
    Script(
        "Punctuation and currency",
        "train",
        False,
        "24-26 2A 3F A2-A5 A9 B1 BF F7 20A0-20A7 20A9-20B4 20B8-20BA 20BD 2103 2114 2116-2117 "
        "211E 2121 2125",
    ),
    Script(
        "Cyrillic",
        "val",
        True,
        "402 404 409-40B 40F 411 414 41A 420 426 42B-42F 44A 452 45B 460 462-464 466 468 46A 46C "
        "46E 470-471 474 478-479 47C 47E 480 48A 48C 48E-48F 494 496 498 49B-49C 49E-4A0 4A3 4A6 "
        "4A8 4AA 4AD 4B0-4B2 4B6 4B8 4BC 4BE 4C3 4CB 4CD 4D8 4E0 4F7 4FA 4FE 500 502 504 506 508 "
        "50A 50C 50E 510 512 514 516-519 51F-520 522 524 A644 A64C A650 A654 A656-A657 A662 A664 "
        "A666 A66A A66C A66E A68C A694-A695",
    ),
    Script(
        "Old Italic",
        "val",
        True,
        "10302 10304 1030A-1030E 10310 10312 10316 10319 1031D 10323",
    ),
    Script(
        "Ogham",
        "val",
        True,
        "1682-1683 1686-1689 168B-168E 1691-1693 1695-1699",
    ),
    Script(
        "Lao",
        "val",
        True,
        "E81-E82 E84 E87-E88 E8A E8D E94-E97 E99-E9A E9C-E9E EA1-EA3 EA5 EA7 EAA EAD-EB0 EB2 EBD "
        "EC0-EC3 ED1-ED9",
    ),
    Script(
        "Georgian",
        "test",
        True,
        "10A0-10A3 10A5 10A7-10AC 10AE-10B5 10B7-10B8 10BA-10BD 10BF-10C0 10C2-10C5 10D0-10D4 "
        "10D7 10D9-10DA 10DD 10DF-10E4 10E6 10E8-10EA 10EC-10ED 10EF-10F2 10F5-10F6 10F8-10F9 "
        "2D00-2D03 2D05-2D07 2D09-2D0C 2D0F-2D10 2D12-2D15 2D17-2D18 2D1B-2D1F 2D21-2D25",
    ),
    Script(
        "Armenian",
        "test",
        True,
        "531-532 534-539 53B 53D-547 54A-54C 54E 550 552-554 556 561 564 568-569 56B 56D 570-574 "
        "576 579-57D 580 583 586",
    ),
    Script(
        "Arabic",
        "test",
        True,
        "628-62A 62C-631 633-634 636-63A 641-64A 660 662-664 667-669 66E-66F 679 686 691 6A9 6AF "
        "6BA-6BB 6BE 6F4-6F6",
    ),
    Script(
        "Hebrew",
        "test",
        True,
        "5D0-5D4 5D8 5DA-5DC 5DE 5E0 5E2-5E4 5E6-5E7 5E9-5EA",
    ),
    Script(
        "Tifinagh",
        "test",
        True,
        "2D32-2D35 2D37 2D3A-2D3F 2D41 2D43-2D47 2D49-2D4E 2D50 2D52-2D53 2D55 2D58-2D5C "
        "2D5E-2D5F 2D62-2D65",
    ),
    Script(
        "N'Ko",
        "test",
        True,
        "7C1-7C6 7C8-7C9 7CC-7D2 7D4 7D6 7D8-7DF 7E1-7E2 7E4-7E7",
    ),
)
