"""Texts for comparing models: many scripts, code, unusual spaces, one to several hundred words."""

from random import Random

_SENTENCES = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other.",
    "Wie drucke ich ein Dokument in Schwarz-Weiß?",
    "Sélectionnez Fichier - Imprimer pour ouvrir la boîte de dialogue.",
    "印刷するには、[ファイル]メニューを開きます。",
    "选择“文件”菜单中的“打印”。",
    "كيف يمكنني طباعة مستند؟",
    "Как распечатать документ на двух сторонах листа?",
    "문서를 인쇄하려면 파일 메뉴를 여십시오.",
    "मैं दस्तावेज़ कैसे प्रिंट करूँ?",
    "Πώς μπορώ να εκτυπώσω ένα έγγραφο;",  # noqa: RUF001
    "איך מדפיסים מסמך?",
    "ฉันจะพิมพ์เอกสารได้อย่างไร",
    "¿Cómo imprimo un documento? ¡Rápido!",
    "def slerp(a, b, t):\n    return a * (1 - t) + b * t\n",
    "SELECT name, COUNT(*) FROM pairs GROUP BY name HAVING COUNT(*) > 2;",
    "3.14159 26535 89793, -1e-7, 0x7FFF, 1/3",
    "  spaces   before,\tbetween \n\n and behind  ",
    "naïve café — “quotes”, …dots… 🙂👩‍👩‍👧",
    "x",
)


def sample_texts(count: int = 200) -> list[str]:
    """Return `count` texts of 1 to 32 sentences, always the same ones."""
    draw = Random(0)
    return [
        " ".join([*draw.choices(_SENTENCES, k=draw.choice((1, 1, 1, 2, 4, 8, 32))), str(number)])
        for number in range(count)
    ]
