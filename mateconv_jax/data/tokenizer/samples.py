"""Texts to try a tokenizer on, written for this purpose: a few of each kind, and what is hard to give back unchanged."""

# A few hundred characters of each kind of text, to see how well it is compressed.
SAMPLES = {
    "modern prose": (
        "天还没有完全亮，巷子口的早点铺已经冒起了热气。老板娘把蒸笼一层一层地摞好，又回头去翻锅里的油条。"
        "卖报的老人推着车从桥上下来，车轮压过湿漉漉的石板，发出细碎的声响。他在铺子前停住，要了一碗豆浆，"
        "慢慢地喝着，眼睛却望着河对岸那一排刚刚亮起灯光的窗户。三十年前，他也住在那里，每天清晨被母亲叫醒，"
        "背着书包，踩着同样的石板去上学。如今母亲早已不在，房子也换了主人，只有这条河还是老样子，"
        "不紧不慢地流着，好像什么都没有发生过。他放下碗，从口袋里摸出几枚硬币，轻轻地排在桌上。"
        "“明天还来吗？”老板娘问。“来。”他说，“只要走得动，就来。”"
    ),
    "classical verse": (
        "孤城落日照寒沙，一片西风卷暮笳。\n戍客登楼听远笛，梦随归雁到天涯。\n"
        "春水初生满石溪，柳条深处乳莺啼。\n山翁醉卧松阴下，一任残花覆马蹄。\n"
        "秋夜长，更漏促，半窗斜月疏疏竹。\n人未眠，灯明灭，欲寄音书霜满轴。\n"
        "夫学者，所以修身也；身既修，然后可以治人。故君子慎其独，不以无人而废其行，不以难成而易其志。\n"
        "江上青山无数重，烟波渺渺隔鸣钟。\n扁舟一叶归何晚，载得梅花伴老农。\n"
    ),
    "news": (
        "本报讯（记者 周远）市交通运输局昨日召开新闻发布会，通报今年上半年公共交通建设进展情况。据介绍，"
        "地铁五号线二期工程已经完成全部车站的主体结构施工，预计明年第三季度投入试运行。届时，从东部新城到火车站的"
        "通行时间将由原来的五十五分钟缩短至二十八分钟。发布会上，相关负责人表示，下一步将继续加大财政投入，"
        "优化公交线网布局，重点解决郊区居民出行难的问题，并在全市范围内推广新能源公交车辆。专家指出，"
        "发展公共交通不仅有助于缓解城市拥堵，对改善空气质量、促进区域经济协调发展也具有重要意义。"
        "截至六月底，全市公共交通日均客流量同比增长百分之十二点六。"
    ),
    "dialogue": (
        "用户：你好，我想学做番茄炒蛋，应该怎么开始？\n助手：你好！番茄炒蛋很适合初学者。请准备两个番茄、三个鸡蛋、"
        "一小勺盐和半勺糖。\n用户：先炒鸡蛋还是先炒番茄呢？\n助手：先炒鸡蛋。把鸡蛋打散，油热以后倒进去，"
        "凝固了就盛出来；然后再炒番茄，等它出汁，最后把鸡蛋放回锅里翻匀就可以了。\n用户：为什么要放糖？会不会太甜？\n"
        "助手：不会的，糖是用来中和番茄的酸味的，放一点点就好。如果您不喜欢，也可以不放。\n用户：明白了，谢谢！\n"
        "助手：不客气，祝您做得成功！如果还有别的问题，随时都可以问我。\n"
    ),
    "technical": (
        "在默认配置下，缓存大小为 512 MB，页面大小为 4096 字节，超时时间为 30 秒。若并发连接数超过 10000，"
        "建议将参数 max_connections 调整为 20480，并把日志级别设为 WARN。测试结果显示，版本 2.7.18 的平均延迟是 3.14 毫秒，"
        "第 99 百分位为 27.6 毫秒；升级到版本 3.11.4 之后，两者分别下降了 18.5% 和 42.3%。服务器配置如下："
        "CPU 为 64 核、主频 2.45 GHz，内存 256 GB，硬盘 7.68 TB。2023 年 11 月 5 日 09:30:00 至 17:45:59 期间，"
        "系统共处理请求 1,284,907,366 次，错误率低于 0.0012%。公式为 E = m × c²，其中 c ≈ 2.998 × 10⁸ m/s。"
    ),
    "code": (
        "import json\nfrom pathlib import Path\n\n\n"
        "def count_words(path: str, minimum: int = 2) -> dict[str, int]:\n"
        '    """统计每个词出现的次数。"""\n    counts = {}\n'
        '    for line in Path(path).read_text(encoding="utf-8").splitlines():\n'
        "        if not line.strip():\n            continue  # 跳过空行\n"
        '        for word in json.loads(line)["text"].split():\n'
        "            counts[word] = counts.get(word, 0) + 1\n"
        "    return {word: n for word, n in counts.items() if n >= minimum}\n\n\n"
        'if __name__ == "__main__":\n'
        '    words = count_words("data.jsonl")\n'
        "    for word, n in sorted(words.items(), key=lambda x: -x[1])[:10]:\n"
        '        print(f"{word:<20} {n:>8,}")\n'
    ),
    "English": (
        "The ferry left the harbour a few minutes before seven, while the lamps along the quay were still burning. Most of "
        "the passengers stayed inside, where it was warm, and watched the town grow smaller through windows that were wet "
        "with spray. A girl in a yellow coat stood alone on the upper deck. She had promised her brother to count every "
        "lighthouse between here and the islands, and she did not want to miss the first. \"One,\" she said aloud, when "
        "the white tower came out of the mist, and wrote it down in a notebook that she kept in her pocket.\n"
    ),
    "emoji and mixed": (
        "今天终于放假啦🎉🎉！和 Linda 一起去爬山⛰️，结果半路下雨☔，鞋子全湿了😭😭 不过山顶的 view 真的绝了👍🏻，"
        "随手拍了 20 多张 photo📷～晚上吃火锅🍲，AA 制，人均 ¥86，超划算！！ @小鱼 下次 weekend 一起来呀❤️ "
        "#周末去哪儿# 对了，谁有推荐的 APP 可以剪 video？在线等，挺急的(￣▽￣) ok 先睡了，晚安～😴 zzZ… "
        "BTW 明早 8:00 am 开会，别迟到哦🙏 私信我 or 发 email 都行，THX 👨‍👩‍👧🇨🇳"
    ),
}  # fmt: skip

# What a round trip must give back unchanged, and what it goes wrong on. Control tokens of the tokenizer itself are added.
HARD_CASES = {
    "the first 256 characters": "".join(map(chr, range(256))),
    "a character of every 256": "".join(chr(code) for code in range(0x150, 0x110000, 0x100) if not 0xD800 <= code < 0xE000),
    "spaces at both ends": "  两头有空格  ",
    "runs of white space": "a  b   c\t\td \n\n\n e\r\nf\u3000\u3000g\u00a0h\u2009i\n",
    "spaces before punctuation": "好 ， 吗 ？ I 'm here . Do n't go , please !",
    "capitals": "MateConv HELLO ÀÉÎ ΑΒΓ",
    "full width and compatibility": "ＡＢＣ１２３，ﬁ①㈱㎏ﷺ\u3000Ⅷ",
    "combining marks": "e\u0301 é Việt u\u031b\u0323 नमस्ते ก็ Z\u0351\u036f\u0321\u0337",
    "rare and compatibility Han": "𠮷𪚥𰻝 﨑豈更 〇々〆 龘靐齉",
    "emoji sequences": "👨‍👩‍👧‍👦 👍🏽 🇨🇳 🏳️‍🌈 1️⃣ ☺️ 🫠",
    "other scripts": "日本語のテキスト 한국어 Русский العربية עברית ไทย",
    "invisible characters": "零\u200b宽\u200d\u2060\ufeff字\u00ad符\u202e右\u202c",
    "numbers": "0 007 3.14159 1,000,000 2024-02-30 ½ ² ١٢٣",
    "escapes": r"\n \\ \xe4\xb8\xad &amp; %E4%B8%AD",
    "nothing": "",
}  # fmt: skip
