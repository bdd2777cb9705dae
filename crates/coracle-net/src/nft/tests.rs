use super::*;

/// Bytes as hexadecimal words of four.
fn hex(bytes: &[u8]) -> String {
    let words: Vec<_> =
        bytes.chunks(4).map(|w| w.iter().map(|b| format!("{b:02x}")).collect::<String>()).collect();
    words.join(" ")
}

#[test]
#[cfg(target_endian = "little")]
fn a_set_element_is_encoded_as_the_kernel_documents_it() {
    let mut batch = Batch::new();
    let element =
        Element { key: vec![6, 0, 0, 0], data: vec![10, 0, 0, 2], comment: "c".into(), ..Element::default() };
    elements(&mut batch, "t", "m", Change::AddNew, &[element]);
    assert_eq!(
        hex(batch.bytes()),
        "4c000000 0c0a0106 00000000 00000000 \
         02000000 \
         06000100 74000000 06000200 6d000000 \
         28000380 24000180 \
         0c000180 08000100 06000000 \
         0c000280 08000100 0a000002 \
         08000600 00026300"
    );
}

#[test]
fn comments_read_back_and_are_cut_where_nft_cuts_them() {
    for text in ["layout 1", &"x".repeat(127)] {
        let mut batch = Batch::new();
        batch.add(0, 0, &[], |m| comment(m, 6, text));
        let userdata = crate::wire::Received(&batch.bytes()[16..]).find(6).unwrap();
        assert_eq!(read_comment(userdata), Some(text));
    }
    for bad in [&[][..], &[0], &[0, 0], &[0, 9, b'x'], &[1, 2, b'x', 0]] {
        assert_eq!(read_comment(bad), None, "{bad:?}");
    }
}

#[test]
fn interface_names_fill_sixteen_bytes() {
    assert_eq!(&ifname("lo")[..3], b"lo\0");
    assert_eq!(ifname("much-too-long-for-it")[15], 0);
}

#[test]
fn concatenated_types_are_numbered_as_nft_numbers_them() {
    assert_eq!(type_number(&[Type::Proto, Type::Port]), 12 << 6 | 13);
    assert_eq!(type_len(&[Type::Ifname, Type::Ipv4]), 20);
}
