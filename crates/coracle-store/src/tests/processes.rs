//! Several processes at once, started at the same moment.

use super::crash::{finish, pass, start};
use super::fixture::{Home, assert_sound, assert_tidy};

#[test]
fn processes_that_pull_the_same_image_share_the_work() {
    let home = Home::new();
    let children: Vec<_> = (0..4).map(|_| start(&home, "pull", "pass", 0)).collect();
    for child in children {
        assert!(!finish(child, "pull beside pulls"));
    }
    assert_eq!(home.store().images().unwrap().len(), 1);
    assert_sound(&home, "after four pulls");
    pass(&home, "collect", "after four pulls");
    assert_tidy(&home, "after four pulls");
}

#[test]
fn many_commands_at_once_leave_a_sound_store() {
    let home = Home::new();
    for round in 0..3 {
        let names = ["pull", "rmi", "implied", "gc", "pull", "rmi", "gc", "run"];
        let children: Vec<_> = names.iter().map(|name| start(&home, name, "pass", 0)).collect();
        for child in children {
            assert!(!finish(child, "many commands"), "round {round}");
        }
        assert_sound(&home, "many commands");
    }
    pass(&home, "collect", "many commands");
    assert_tidy(&home, "many commands");
}
