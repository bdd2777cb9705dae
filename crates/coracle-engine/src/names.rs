//! Names that are made up for containers that were not given one: `adjective_surname`.
//!
//! The form is Docker's; the words are our own: rivers, coasts and weather for the adjectives, people of
//! computing and of the sea for the surnames.

/// First words.
const ADJECTIVES: [&str; 64] = [
    "able", "agile", "amber", "ample", "azure", "brave", "breezy", "bright", "brisk", "buoyant", "calm",
    "careful", "cheerful", "clear", "coastal", "copper", "crisp", "curious", "daring", "deft", "eager",
    "early", "earnest", "fair", "fluent", "fond", "frosty", "gentle", "gleaming", "golden", "graceful",
    "hardy", "hazel", "honest", "humble", "jolly", "keen", "kind", "light", "lively", "lucid", "lunar",
    "mellow", "merry", "misty", "modest", "neat", "nimble", "noble", "patient", "placid", "polite", "quick",
    "quiet", "ready", "serene", "silver", "spry", "steady", "sunny", "swift", "tidal", "vivid", "wise",
];

/// Second words.
const SURNAMES: [&str; 64] = [
    "allen",
    "babbage",
    "backus",
    "barents",
    "beaufort",
    "bering",
    "boole",
    "borg",
    "cabot",
    "cerf",
    "church",
    "codd",
    "cook",
    "cousteau",
    "dampier",
    "davis",
    "dijkstra",
    "diffie",
    "drake",
    "earle",
    "engelbart",
    "ericson",
    "fitzroy",
    "floyd",
    "forrester",
    "frobisher",
    "gama",
    "goldberg",
    "gray",
    "hamilton",
    "hellman",
    "hoare",
    "holberton",
    "hopper",
    "hudson",
    "iverson",
    "kahn",
    "karp",
    "kay",
    "kernighan",
    "knuth",
    "lamport",
    "liskov",
    "lovelace",
    "magellan",
    "maury",
    "mccarthy",
    "mercator",
    "milner",
    "nansen",
    "naur",
    "perlman",
    "polo",
    "postel",
    "ritchie",
    "shackleton",
    "shannon",
    "sinclair",
    "slocum",
    "thompson",
    "turing",
    "wilkes",
    "wirth",
    "zheng",
];

/// A name made of random words; from the fourth attempt on with a digit behind it, so that it ends some day.
pub(crate) fn made_up(attempt: u32, random: u32) -> String {
    let pick =
        |list: &[&'static str; 64], shift: u32| list[usize::try_from((random >> shift) & 63).unwrap_or(0)];
    let name = format!("{}_{}", pick(&ADJECTIVES, 0), pick(&SURNAMES, 6));
    if attempt < 3 { name } else { format!("{name}{}", (random >> 12) % 1000) }
}

/// Whether `name` may be a container's or a volume's: Docker's `[a-zA-Z0-9][a-zA-Z0-9_.-]+`, at most 255 bytes.
pub(crate) fn is_valid(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.len() >= 2
        && name.len() <= 255
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_names_are_valid_and_end_in_a_digit_when_short_ones_are_taken() {
        assert!(is_valid(&made_up(0, 0xdead_beef)));
        assert!(made_up(3, 0xdead_beef).ends_with(|c: char| c.is_ascii_digit()));
    }

    #[test]
    fn names_follow_dockers_pattern() {
        assert!(is_valid("web-1.a_b"));
        for bad in ["", "a", "-ab", "a b", "a/b", ".ab", "a\nb"] {
            assert!(!is_valid(bad), "{bad:?}");
        }
    }
}
